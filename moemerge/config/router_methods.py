"""The table of router methods: what each reads, which settings it takes, and the function that makes its rows.

All other code looks methods up here. A new method is a file in `moemerge.routers` and a row of this table.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

Material = Literal["prompts", "texts", "unsorted texts", "weights"]
"""Inputs of a method: prompts or texts of each expert, texts that are not sorted by expert, the experts' weights."""
Setting = Literal["lambda", "scale", "load_prior", "calibration_texts", "calibration"]
"""Keys under `router` that only some methods use."""
SETTINGS: Final[tuple[Setting, ...]] = get_args(Setting)
AUTO: Final = "auto"
"""The `gate_mode` that chooses a method by the data that the config gives."""


@dataclass(frozen=True)
class RouterMethod:
    """A method of making the first weights of routers."""

    name: str
    """The value of `gate_mode`."""
    function: str
    """`module:function`, imported when routers are made and not before: see `moemerge.routers.method_lookup`."""
    reads: frozenset[Material] = frozenset()
    settings: frozenset[Setting] = frozenset()
    runs_base: bool = True
    """Whether it reads the base model's router inputs, so that the base model has to run."""
    aliases: tuple[str, ...] = ()
    """Other values of `gate_mode` that mean the same method."""
    like_mergekit: bool = False
    """Whether it reads what mergekit-moe does: a BOS before every prompt, the residual stream that enters the layer."""
    solves_for_hidden: bool = False
    """Whether it needs matrices (hidden, hidden) in memory even for little text."""

    reads_what_there_is: bool = False
    """Whether it does with those of its inputs that there are, beside the weights."""
    reads_neutral_text: bool = False
    """Whether it reads moemerge's own neutral text, too."""

    @property
    def reads_descriptions(self) -> bool:
        """Whether it needs prompts or texts for every expert."""
        return "prompts" in self.reads

    @property
    def reads_weights(self) -> bool:
        """Whether it reads the changes that fine-tuning made to the experts' weights."""
        return "weights" in self.reads

    @property
    def needs_weights(self) -> bool:
        """Whether the weights are all that tells it what an expert is for."""
        return self.reads_weights and not self.reads_descriptions

    @property
    def reads_embeddings(self) -> bool:
        """Whether it reads the prompts' embeddings in the base model, and no other weights of that model."""
        return self.reads_descriptions and not self.runs_base

    @property
    def reads_text(self) -> bool:
        """Whether it needs the base model's tokenizer."""
        return self.reads_descriptions or self.runs_base

    @property
    def labels_texts(self) -> bool:
        """Whether a first pass assigns each unsorted document to an expert, by the experts' weights."""
        return self.reads >= {"unsorted texts", "weights"}


_DESCRIPTIONS: Final[frozenset[Material]] = frozenset({"prompts", "texts"})
_SCALED: Final[frozenset[Setting]] = frozenset({"scale", "load_prior", "calibration_texts"})
_SOLVED: Final[frozenset[Setting]] = _SCALED | {"lambda"}
_WRITTEN: Final[frozenset[Setting]] = frozenset({"calibration"})

METHODS: Final[dict[str, RouterMethod]] = {
    method.name: method
    for method in (
        # mergekit-moe's names: its average over positions is `hidden` here.
        RouterMethod(
            "hidden",
            "moemerge.routers.hidden:hidden_rows",
            _DESCRIPTIONS,
            _SCALED | _WRITTEN,
            aliases=("hidden_avg", "hidden_last"),
        ),
        RouterMethod(
            "mergekit_hidden",
            "moemerge.routers.mergekit_hidden:mergekit_hidden_rows",
            frozenset({"prompts"}),
            like_mergekit=True,
        ),
        RouterMethod(
            "combined",
            "moemerge.routers.combined:combined_rows",
            _DESCRIPTIONS | {"unsorted texts", "weights"},
            _SOLVED | _WRITTEN,
            reads_what_there_is=True,
            reads_neutral_text=True,
        ),
        RouterMethod("ridge", "moemerge.routers.ridge:ridge_rows", _DESCRIPTIONS, _SOLVED | _WRITTEN),
        RouterMethod(
            "logistic",
            "moemerge.routers.logistic:logistic_rows",
            _DESCRIPTIONS,
            _SOLVED | _WRITTEN,
            solves_for_hidden=True,
        ),
        RouterMethod("delta", "moemerge.routers.delta:delta_rows", frozenset({"weights"}), _SCALED),
        RouterMethod(
            "delta_bootstrap", "moemerge.routers.ridge:ridge_rows", frozenset({"weights", "unsorted texts"}), _SOLVED
        ),
        RouterMethod(
            "cheap_embed", "moemerge.routers.cheap_embed:cheap_embed_rows", frozenset({"prompts"}), runs_base=False
        ),
        RouterMethod("random", "moemerge.routers.random:normal_rows", runs_base=False),
        RouterMethod("uniform_random", "moemerge.routers.random:uniform_rows", runs_base=False),
    )
}
"""All methods by name, in the order in which messages list them."""
_AUTO: Final = "combined"


def canonical_gate_mode(value: Any) -> Any:
    """Replace an alias of a `gate_mode` by its name in the table; any other value is returned as it is."""
    if isinstance(value, str):
        return next((method.name for method in METHODS.values() if value in method.aliases), value)
    return value


def gate_modes() -> list[str]:
    """All canonical values of `gate_mode`."""
    return [AUTO, *METHODS]


def choose_method(gate_mode: Any, *, described: bool, calibrated: bool) -> RouterMethod:
    """Choose the method that `gate_mode` names, reduced to the inputs that there are if it can do with less.

    An unknown name gives a method that reads nothing and takes no settings.

    Args:
        gate_mode: the value in the config.
        described: whether every expert has prompts or texts.
        calibrated: whether there are calibration texts.
    """
    name = _AUTO if gate_mode == AUTO else gate_mode
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        return RouterMethod(str(gate_mode), "", runs_base=False)
    if not method.reads_what_there_is:
        return method
    if described:  # calibration texts serve a load prior alone
        return replace(method, reads=method.reads - {"unsorted texts"})
    if calibrated:
        return replace(method, reads=method.reads - _DESCRIPTIONS)
    return replace(method, reads=frozenset({"weights"}), settings=method.settings - {"lambda"})
