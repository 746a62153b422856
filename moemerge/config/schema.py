"""The merge config: `mergekit-moe`'s YAML schema, checked completely; every problem is reported with its place.

Schema and key names: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from moemerge.chats import COUNTED_ROLES
from moemerge.config.cross_checks import MIN_EXPERTS, cross_check, listed
from moemerge.config.drawn_anew import DrawnAnew, Reinit
from moemerge.config.expert_names import expert_names
from moemerge.config.plain_values import plain
from moemerge.config.problems import MOST_EXPLAINED, PlacedError, explain
from moemerge.config.router_methods import AUTO, RouterMethod, choose_method
from moemerge.config.tokenizer_choice import BASE, TokenizerChoice
from moemerge.config.value_types import (
    ChatPrompts,
    DTypeName,
    EngineName,
    ExpertName,
    ExpertNumber,
    GateMode,
    Layers,
    Number,
    Prompts,
    Roles,
    Share,
    Text,
    Texts,
)
from moemerge.config.yaml_text import join_halves, write_yaml
from moemerge.places import Place

CONFIG_COPY: Final = "moemerge_config.yaml"
"""Name of the file in a merged model's folder that holds a copy of the config."""
CARD: Final = "README.md"
"""Name of the model card in a merged model's folder, as on the Hub."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Expert(_Strict):
    """An expert: the model that its FFNs come from, and text that should be routed to it."""

    source_model: Text
    """A folder, or a Hub repository as `user/name` or `user/name@revision`."""
    name: ExpertName | None = None
    """Name of the expert in tables, cards and `--data NAME=PATH`; by default one made of the model's name."""
    positive_prompts: Prompts = []
    """Text that should be routed to this expert; a chat is `messages: [{role: user, content: ...}, ...]`."""
    negative_prompts: Prompts = []
    """Text that should not be routed to this expert."""
    positive_texts: Texts = []
    """Files, folders or patterns of such text, or data sets on the Hub as `hf://datasets/user/name:split#column`."""
    negative_texts: Texts = []
    """Files, folders or patterns of text that should not be routed to this expert."""
    noise_scale: Number | None = Field(None, ge=0.0)
    """Standard deviation of Gaussian noise added to the expert's weights."""
    reinit: DrawnAnew = None
    """Share of the expert's neurons that is drawn anew, for training."""
    residual_scale: Number | None = None
    """Factor on the expert's down projection, and so on what it adds to the residual stream."""

    @property
    def is_described(self) -> bool:
        """Whether it has positive prompts or texts."""
        return bool(self.positive_prompts or self.positive_texts)


class RoutedExpert(Expert):
    """An expert that the router chooses."""

    layers: Layers = "all"
    """Layers that hold the expert."""
    by_layer: list[ExpertNumber | Annotated[dict[ExpertNumber, Share], Field(min_length=1)]] | None = None
    """Of a mixture, as `source_model`, the number of the expert to take in each of its layers with a router; or
    several with the share of each, for their average, which has the router row of the first."""


class RouterSettings(_Strict):
    """Settings of the router methods; see docs/routers.md."""

    lambda_: Number | None = Field(None, alias="lambda", gt=0)
    """Regularisation of ridge and logistic, relative to the mean variance of router inputs; by default by tokens."""
    scale: Number = Field(1.0, ge=1e-6, le=1e6)
    """Factor on the scale that is fitted: above 1 the chosen experts are mixed less."""
    tokens_per_expert: int = Field(4096, ge=1, strict=True)
    """Tokens that are read of each expert's texts; of the calibration texts, as many for each expert."""
    calibration_texts: Texts = []
    """Files, folders or patterns of text that is not sorted by expert."""
    calibration: Literal["generate"] | None = None
    """`generate`: experts without texts continue their positive prompts, and routers are fitted to what they write."""
    load_prior: list[Annotated[Number, Field(ge=1e-6, le=1e6)]] | None = None
    """Share of the calibration texts that each expert should take, in the order of the experts."""
    chat_prompts: ChatPrompts = False
    """Whether plain prompts are put into the base's chat template; `auto`: where all models have one."""
    chat_roles: Roles = list(COUNTED_ROLES)
    """Whose messages count; the others, and the template's own tokens, only pass through the base model."""
    fitted: bool = Field(default=False, strict=True)
    """Whether kept rows were fitted to text by `moemerge prune`, which a config cannot do again."""
    seed: int | None = Field(None, ge=0, strict=True)
    """Seed for random routers, and for the choice of documents where there are more than needed."""


_SharedMethod = Literal["base", "average", "ties", "dare", "auto"]


class SharedWeights(_Strict):
    """Settings for embeddings, attention and norms; see docs/quality.md."""

    method: _SharedMethod = "base"
    """`auto` is one of the first three, chosen by the experts' texts when the merge begins."""
    weights: list[Annotated[Number, Field(gt=0)]] | None = None
    """Weights of the experts in a mean, in their order, divided by their sum; by default all weigh alike."""
    density: Number = Field(0.5, ge=1e-6, le=1)
    """Share of each expert's changes that `ties` and `dare` keep."""
    seed: int = Field(0, ge=0, strict=True)
    """Seed for the changes that `dare` keeps."""

    @property
    def is_open(self) -> bool:
        """Whether the merge has to choose the method."""
        return self.method == "auto"


def _shared_weights(value: Any) -> Any:
    """Turn a method's name alone into settings."""
    if isinstance(value, bool | int | float | list):
        known = ", ".join(get_args(_SharedMethod))
        raise ValueError(f"expected one of {known}; or keys such as method: ties, density: 0.5")  # noqa: TRY004  pydantic's
    return {"method": value} if isinstance(value, str) else {} if value is None else value


class MergeConfig(_Strict):
    """A merge: a base model and the experts whose FFNs are stacked into it.

    Keyword arguments, as in the YAML, are checked as a file is.

    Raises:
        ConfigError: lists every problem with its address.
    """

    base_model: Text
    """Where embeddings, attention, norms and, with `tokenizer: base`, the tokenizer come from."""
    experts: list[RoutedExpert] = Field(json_schema_extra={"minItems": MIN_EXPERTS})
    """The models whose FFNs the router chooses between."""
    gate_mode: GateMode = AUTO
    """The method that makes the routers, or `auto`, the best one that there is data for; see docs/routers.md."""
    dtype: DTypeName = None
    """Dtype of the merged model; by default the base model's."""
    experts_per_token: int = Field(2, ge=1, strict=True)
    """How many experts take each token."""
    granularity: int = Field(1, ge=1, strict=True)
    """Number of narrower experts that each expert of an edited mixture is split into; all are chosen together."""
    expert_width: int | None = Field(None, ge=1, strict=True)
    """Neurons of each expert of an edited mixture; narrower experts are padded with zeros."""
    shared_experts: Annotated[list[Expert], BeforeValidator(listed, json_schema_input_type=list[Expert] | None)] = []
    """Experts that every token passes through."""
    architecture: Text | None = None
    """The output family's `model_type`; by default the one that most engines compute correctly."""
    engine: EngineName = None
    """The engine that has to compute the merged model correctly; by default any."""
    moe_layers: Layers = "all"
    """Layers that hold experts; the others keep the base model's FFN."""
    shared_weights: Annotated[
        SharedWeights,
        BeforeValidator(_shared_weights, json_schema_input_type=_SharedMethod | SharedWeights | None),
    ] = Field(default_factory=lambda: SharedWeights.model_validate({}))
    """Settings for embeddings, attention and norms: the base model's, or a mix of all models'."""
    keep_vision: bool = Field(default=False, strict=True)
    """Whether the merged model has the towers of a multimodal base beside its text model."""
    fold_norms: bool = Field(default=False, strict=True)
    """Whether the difference between an expert's own norm and the shared one is folded into its FFN."""
    tokenizer: TokenizerChoice = BASE
    """The output's tokenizer: the base's; with `union` the experts' added tokens, too; or an `expert NAME`'s."""
    tokenizer_source: TokenizerChoice = BASE
    """mergekit's name of `tokenizer`."""
    router: Annotated[
        RouterSettings,
        BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=RouterSettings | None),
    ] = Field(default_factory=lambda: RouterSettings.model_validate({}))
    """Settings of the method that makes the routers."""

    _text: str = PrivateAttr("")
    _file: Path | None = PrivateAttr(None)
    _checked: dict[str, Any] = PrivateAttr(default_factory=dict)
    _identical: bool = PrivateAttr(default=False)

    def __init__(self, allow_identical_experts: bool = False, /, **document: Any) -> None:
        document, halves = join_halves(plain(document))
        problems: list[tuple[Place, str]] = [(place, "holds half of a letter, a lone surrogate") for place in halves]
        problems += cross_check(document, allow_identical_experts=allow_identical_experts)
        try:
            super().__init__(**document)
        except ValidationError as error:
            problems += [
                (detail["loc"], explain(detail, _known_keys) if number < MOST_EXPLAINED else "is wrong, too")
                for number, detail in enumerate(error.errors())
            ]
        if problems:
            raise PlacedError(problems)
        self._checked, self._identical = self.model_dump(), allow_identical_experts

    def rechecked(self) -> "MergeConfig":
        """Return this config, checked again if it was changed by `model_copy`.

        Raises:
            ConfigError: lists every problem with its address.
        """
        if self.model_dump() == self._checked:
            return self
        again = MergeConfig(self._identical, **self.model_dump(by_alias=True))
        again._file = self._file
        return again

    def was_read_from(self, text: str, file: Path | None = None) -> None:
        """Record the YAML that the config was read from, and the file that held it."""
        self._text, self._file = text, file

    @property
    def written(self) -> str:
        """The YAML that the config was read from; empty if it was made otherwise."""
        return self._text

    @property
    def file(self) -> Path | None:
        """The file that the config was read from, if there is one."""
        return self._file

    @property
    def text(self) -> str:
        """The YAML that the config was read from, or equivalent YAML."""
        if self._text and self.model_dump() == self._checked:
            return self._text
        document = self.model_dump(exclude_defaults=True, by_alias=True)
        if "shared_weights" in self.model_fields_set:  # `base`, if it was chosen, is said too
            document.setdefault("shared_weights", self.shared_weights.method)
        return write_yaml(document)

    @property
    def method(self) -> RouterMethod:
        """The router method that `gate_mode` names; for `auto`, the best one that there is data for."""
        calibrated = bool(self.router.calibration_texts)
        return choose_method(self.gate_mode, described=self.has_descriptions, calibrated=calibrated)

    @property
    def vocabulary(self) -> str:
        """Whose tokenizer the output has: `base`, `union`, or `expert NAME`."""
        return self.tokenizer if self.tokenizer != BASE else self.tokenizer_source

    @property
    def computes_shared_gate(self) -> bool:
        """Whether the gate of the shared experts is made from prompts."""
        return self.method.runs_base and any(expert.is_described for expert in self.shared_experts)

    @property
    def writers(self) -> list[int]:
        """Numbers of the experts that write text for the routers: those with prompts and no texts."""
        if self.router.calibration != "generate":
            return []
        return [e for e, expert in enumerate(self.experts) if expert.positive_prompts and not expert.positive_texts]

    @property
    def expert_names(self) -> tuple[str, ...]:
        """A unique name for each expert: its own, or one made of the name of its model."""
        return expert_names([e.source_model for e in self.experts], [e.name for e in self.experts])

    @property
    def has_descriptions(self) -> bool:
        """Whether every expert has positive prompts or texts."""
        return all(expert.is_described for expert in self.experts)


def _known_keys(place: Place) -> list[str]:
    """The keys that are allowed beside the one at a place."""
    models: dict[str, type[_Strict]] = {
        "experts": RoutedExpert,
        "shared_experts": Expert,
        "router": RouterSettings,
        "shared_weights": SharedWeights,
    }
    if "reinit" in place[1:-1]:
        return list(Reinit.model_fields)
    model = models.get(str(place[0]), MergeConfig) if len(place) > 1 else MergeConfig
    return [field.alias or name for name, field in model.model_fields.items()]
