"""The merge config: `mergekit-moe`'s YAML schema, checked completely, every problem with its place.

Schema and key names: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

import difflib
import reprlib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from moemerge.config_checks import Place, canonical_gate_mode, choose_way, cross_check, listed
from moemerge.dtypes import SHORT, DType
from moemerge.errors import ConfigError
from moemerge.layer_choice import LayerChoice, read_layers

CONFIG_COPY: Final = "moemerge_config.yaml"
"""What a merged model's folder calls the config that it was made from."""
RouterWay = Literal[
    "hidden", "mergekit_hidden", "ridge", "logistic", "delta", "delta_bootstrap", "cheap_embed", "random",
    "uniform_random",
]  # fmt: skip
GateMode = Literal["auto", RouterWay]
# A YAML file of a few lines can hold a value whose whole text would never end.
_short: Final = reprlib.Repr()
_short.maxstring = 60


def _canonical_dtype(value: Any) -> Any:
    return SHORT.get(value.removeprefix("torch."), value.removeprefix("torch.")) if isinstance(value, str) else value


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004  pydantic's
    return value


Text = Annotated[str, Field(strict=True, min_length=1)]
Prompts = Annotated[list[Annotated[str, Field(strict=True)]], BeforeValidator(listed)]
Texts = Annotated[list[Text], BeforeValidator(listed)]


Layers = Annotated[LayerChoice, PlainValidator(read_layers)]
"""Layers of a model as people write them: see `moemerge.layer_choice`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expert(_Strict):
    """One expert: the model that its FFNs come from, and text that says what it is for."""

    source_model: Text
    """Folder, or Hub repository `user/name`, or `user/name@revision`."""
    positive_prompts: Prompts = []
    """Text that should be routed to this expert."""
    negative_prompts: Prompts = []
    """Text that should not."""
    positive_texts: Texts = []
    """Files, folders or patterns of such text, beside or instead of prompts: see `moemerge.texts`."""
    negative_texts: Texts = []
    """The same of text that should not."""
    noise_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Standard deviation of Gaussian noise added to the expert's weights."""
    residual_scale: float | None = Field(None, allow_inf_nan=False)
    """Factor on the expert's down projection, that is, on what it adds to the residual stream."""

    @property
    def is_described(self) -> bool:
        """Whether prompts or texts say what should be routed to it."""
        return bool(self.positive_prompts or self.positive_texts)


class RoutedExpert(Expert):
    """An expert that the router chooses."""

    layers: Layers = "all"
    """Layers in which it takes part."""


class RouterSettings(_Strict):
    """How routers are made of what `gate_mode` uses; see docs/routers.md."""

    lambda_: Annotated[float | None, BeforeValidator(_no_flag)] = Field(None, alias="lambda", gt=0, allow_inf_nan=False)
    """Regularisation of ridge and logistic, relative to the mean variance of router inputs; None: by token count."""
    scale: Annotated[float, BeforeValidator(_no_flag)] = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor on the scale that is fitted: above 1 the chosen experts are mixed less."""
    tokens_per_expert: int = Field(4096, ge=1, strict=True)
    """How many tokens of its texts are read for each expert, and as many of the calibration texts for each."""
    calibration_texts: Texts = []
    """Files, folders or patterns of text that is not sorted by expert."""
    load_prior: list[Annotated[float, BeforeValidator(_no_flag), Field(gt=0, allow_inf_nan=False)]] | None = None
    """Share of the calibration texts that each expert should take, in the order of the experts."""
    seed: int | None = Field(None, ge=0, strict=True)
    """Of random routers, and of which documents are read where there are more than are needed."""


class SharedWeights(_Strict):
    """How embeddings, attention and norms are made; see `moemerge.shared_weights`."""

    method: Literal["base", "average", "ties", "dare"] = "base"
    weights: list[Annotated[float, BeforeValidator(_no_flag), Field(gt=0, allow_inf_nan=False)]] | None = None
    """Of the experts, in their order; they are divided by their sum. None: all alike."""
    density: Annotated[float, BeforeValidator(_no_flag)] = Field(0.5, gt=0, le=1, allow_inf_nan=False)
    """Of `ties` and `dare`: the share of an expert's changes that is kept."""
    seed: int = Field(0, ge=0, strict=True)
    """Of `dare`."""


class MergeConfig(_Strict):
    """A merge: a base model and the experts whose FFNs are stacked into it."""

    base_model: Text
    """Where embeddings, attention, norms and the tokenizer come from."""
    experts: list[RoutedExpert]
    gate_mode: Annotated[GateMode, BeforeValidator(canonical_gate_mode)] = "auto"
    dtype: Annotated[DType | None, BeforeValidator(_canonical_dtype)] = None
    """Of the merged model; None keeps the base model's."""
    experts_per_token: int = Field(2, ge=1, strict=True)
    shared_experts: Annotated[list[Expert], BeforeValidator(listed)] = []
    architecture: Text | None = None
    """The output family's `model_type`; None chooses the first that fits."""
    moe_layers: Layers = "all"
    """Layers that hold experts; the others keep the base model's FFN."""
    shared_weights: Annotated[
        SharedWeights,
        BeforeValidator(lambda value: {"method": value} if isinstance(value, str) else {} if value is None else value),
    ] = Field(default_factory=lambda: SharedWeights.model_validate({}))
    """Embeddings, attention and norms: the base model's, or made of all models' own."""
    fold_norms: bool = Field(default=False, strict=True)
    """Whether what an expert's own norm before its FFN does beyond the shared one is folded into the FFN."""
    router: Annotated[RouterSettings, BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=lambda: RouterSettings.model_validate({})
    )

    _text: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """The YAML that it was read from, or says the same."""
        document = self.model_dump(exclude_defaults=True, by_alias=True)
        if self._text and MergeConfig.model_validate(yaml.safe_load(self._text)).model_dump() == self.model_dump():
            return self._text
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)

    @property
    def way(self) -> RouterWay:
        """How its routers are made: `gate_mode`, or what `auto` finds to be the best that there is data for."""
        way: RouterWay = choose_way(
            self.gate_mode, described=self.has_descriptions, calibrated=bool(self.router.calibration_texts)
        )
        return way

    @property
    def needs_pass(self) -> bool:
        """Whether its routers are made from what the base model computes of text."""
        return self.way not in {"cheap_embed", "random", "uniform_random"}

    @property
    def reads_text(self) -> bool:
        """Whether its routers are made from text."""
        return self.way not in {"random", "uniform_random"}

    @property
    def computes_shared_gate(self) -> bool:
        """Whether prompts say when a shared expert that has a gate should speak."""
        return self.needs_pass and any(expert.is_described for expert in self.shared_experts)

    @property
    def has_descriptions(self) -> bool:
        """Whether prompts or texts say of every expert what should be routed to it."""
        return all(expert.is_described for expert in self.experts)


def load_config(path: Path | str, *, allow_identical_experts: bool = False) -> MergeConfig:
    """Read and check a merge config.

    Args:
        path: the YAML file.
        allow_identical_experts: accept experts that are all the same model.

    Raises:
        ConfigError: lists every problem with its line and address.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.", []) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8.", []) from error
    return parse_config(text, str(path), allow_identical_experts=allow_identical_experts)


def parse_config(text: str, name: str = "config", *, allow_identical_experts: bool = False) -> MergeConfig:
    """Check the text of a merge config; `name` stands for it in messages. See `load_config`."""
    try:
        document = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, IndexError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML:", [" ".join(str(error).split())]) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: expected keys such as base_model and experts, found {_short.repr(document)}.", [])
    problems: list[tuple[tuple[int | str, ...], str]] = list(_repeated_keys(node))
    config = None
    try:
        config = MergeConfig.model_validate(document)
    except ValidationError as error:
        problems += [(detail["loc"], _explain(detail)) for detail in error.errors()]
    problems += cross_check(document, allow_identical_experts=allow_identical_experts)
    if problems or config is None:
        located = sorted((_line(node, place), _address(place), problem) for place, problem in problems)
        lines = [f"line {line}: {address}: {problem}" if address else problem for line, address, problem in located]
        raise ConfigError(f"{name}: {len(lines)} problem{'s' if len(lines) > 1 else ''}:", lines)
    config._text = text  # noqa: SLF001  its own class's
    return config


def _explain(detail: ErrorDetails) -> str:  # noqa: PLR0911  one for each kind
    """One pydantic error in the words of someone who writes the YAML."""
    key, value = detail["loc"][-1], detail["input"]
    if detail["type"] == "extra_forbidden":
        models: dict[str, type[_Strict]] = {
            "experts": RoutedExpert, "shared_experts": Expert, "router": RouterSettings,
            "shared_weights": SharedWeights,
        }  # fmt: skip
        model = models.get(str(detail["loc"][0]), MergeConfig) if len(detail["loc"]) > 1 else MergeConfig
        known = [field.alias or name for name, field in model.model_fields.items()]
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        return f"unknown key, did you mean {near[0]}?" if near else f"unknown key; known: {', '.join(known)}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "literal_error":
        choices = detail["ctx"]["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value), choices.replace(" or ", ", ").split(", "), n=1)
        return f"expected {choices}, found {_short.repr(value)}" + (f"; did you mean {near[0]}?" if near else "")
    if detail["type"] == "string_type":
        in_prompts = any(str(step).endswith("_prompts") for step in detail["loc"])
        return f"expected text, found {_short.repr(value)}" + ("; write it in quotes" if in_prompts else "")
    if detail["type"] == "float_parsing":
        return f"expected a number, found {_short.repr(value)}"
    if detail["type"] == "model_type":
        return f"expected keys with values, found {_short.repr(value)}"
    if detail["type"] == "value_error":
        return f"{detail['ctx']['error']}, found {_short.repr(value)}"
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, found {_short.repr(value)}"


def _address(place: Place) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".")


def _line(node: yaml.Node | None, place: Place) -> int:
    """Line of the innermost step of `place` that the document has."""
    line = node.start_mark.line + 1 if node else 1
    for step in place:
        child = None
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == step), None)
            if pair:
                line, child = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            child = node.value[step]
            line = child.start_mark.line + 1
        if child is None:
            return line
        node = child
    return line


def _repeated_keys(node: yaml.Node | None) -> list[tuple[Place, str]]:
    """YAML keeps the last of two equal keys in silence; looked for at the top and in each expert."""
    mappings: list[tuple[Place, yaml.Node | None]] = [((), node)]
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if isinstance(value, yaml.SequenceNode):
            mappings += [((key.value, index), child) for index, child in enumerate(value.value)]
    problems = []
    for place, mapping in mappings:
        keys = [key.value for key, _ in mapping.value] if isinstance(mapping, yaml.MappingNode) else []
        problems += [((*place, key), "is written twice") for key in dict.fromkeys(keys) if keys.count(key) > 1]
    return problems
