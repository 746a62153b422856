"""The merge config: `mergekit-moe`'s YAML schema, checked completely, every problem with its place.

Schema and key names: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
)
from pydantic_core import PydanticKnownError

from moemerge.chats import COUNTED_ROLES, Document, Role
from moemerge.config.chat_prompts import plain_prompt, read_prompt
from moemerge.config.checks import cross_check, listed, listed_prompts
from moemerge.config.layer_choice import LayerChoice, read_layers
from moemerge.config.problems import MOST_EXPLAINED, SHORT_REPR, PlacedError, explain, repeated_keys
from moemerge.config.router_methods import AUTO, RouterMethod, canonical_gate_mode, choose_method, gate_modes
from moemerge.config.yaml_text import Place, YamlTextError, join_halves, read_yaml
from moemerge.dtypes import DTYPE_ALIASES, DType
from moemerge.engines import Engine, engine_of
from moemerge.errors import ConfigError

CONFIG_COPY: Final = "moemerge_config.yaml"
"""What a merged model's folder calls the config that it was made from."""
CARD: Final = "README.md"
"""What a merged model's folder calls the model card, as the Hub does."""
_MOST_CHARACTERS: Final = 4_000_000
_DEEPEST: Final = 50
_LARGEST: Final = 10**300


def _canonical_dtype(value: Any) -> Any:
    return (
        DTYPE_ALIASES.get(value.removeprefix("torch."), value.removeprefix("torch."))
        if isinstance(value, str)
        else value
    )


def _gate_mode_of(value: Any) -> str:
    """A value that the table of methods has, as it is spelled there; refused as one that a `Literal` lacks."""
    name, known = canonical_gate_mode(value), gate_modes()
    if isinstance(name, str) and name in known:
        return name
    expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
    raise PydanticKnownError("literal_error", {"expected": expected})


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004  pydantic's
    return value


def _true_false_auto(value: Any) -> Any:
    if not isinstance(value, bool) and value != "auto":
        raise ValueError("expected true, false or auto")
    return value


# Below it float32 has fewer digits, and at last none.
_SMALLEST: Final = 2.0**-126


def _in_float32(value: float) -> float:
    """A number that is computed with in float32, where it is neither infinite nor vanishes."""
    try:
        held = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        raise ValueError(
            "expected a number below 3.4e+38: values are computed in float32, which holds no larger one"
        ) from None
    if value and abs(held) < _SMALLEST:
        raise ValueError(
            "expected 0 or a number above 1.2e-38: values are computed in float32, which holds no smaller one"
        )
    return value


Number = Annotated[float, BeforeValidator(_no_flag), Field(allow_inf_nan=False), AfterValidator(_in_float32)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Prompt = Annotated[Document, PlainValidator(read_prompt), PlainSerializer(plain_prompt)]
Prompts = Annotated[list[Prompt], BeforeValidator(listed_prompts)]
Texts = Annotated[list[Text], BeforeValidator(listed)]


Layers = Annotated[LayerChoice, PlainValidator(read_layers)]
"""Layers of a model as people write them: see `moemerge.config.layer_choice`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expert(_Strict):
    """One expert: the model that its FFNs come from, and text that says what it is for."""

    source_model: Text
    """Folder, or Hub repository `user/name`, or `user/name@revision`."""
    positive_prompts: Prompts = []
    """Text that should be routed to this expert; a chat is `messages: [{role: user, content: ...}, ...]`."""
    negative_prompts: Prompts = []
    """Text that should not."""
    positive_texts: Texts = []
    """Files, folders or patterns of such text, or data sets on the Hub: see `moemerge.texts.documents`."""
    negative_texts: Texts = []
    """The same of text that should not."""
    noise_scale: Number | None = Field(None, ge=0)
    """Standard deviation of Gaussian noise added to the expert's weights."""
    residual_scale: Number | None = None
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

    lambda_: Number | None = Field(None, alias="lambda", gt=0)
    """Regularisation of ridge and logistic, relative to the mean variance of router inputs; None: by token count."""
    scale: Number = Field(1.0, ge=1e-6, le=1e6)
    """Factor on the scale that is fitted: above 1 the chosen experts are mixed less."""
    tokens_per_expert: int = Field(4096, ge=1, strict=True)
    """How many tokens of its texts are read for each expert, and as many of the calibration texts for each."""
    calibration_texts: Texts = []
    """Files, folders or patterns of text that is not sorted by expert."""
    load_prior: list[Annotated[Number, Field(ge=1e-6, le=1e6)]] | None = None
    """Share of the calibration texts that each expert should take, in the order of the experts."""
    chat_prompts: Annotated[Literal["auto"] | bool, PlainValidator(_true_false_auto)] = False
    """Whether plain prompts are put into the base's chat template; `auto`: where all models have one."""
    chat_roles: Annotated[list[Role], BeforeValidator(listed), Field(min_length=1)] = list(COUNTED_ROLES)
    """Whose messages count; the others, and the template's own tokens, only pass through the base model."""
    seed: int | None = Field(None, ge=0, strict=True)
    """Of random routers, and of which documents are read where there are more than are needed."""


class SharedWeights(_Strict):
    """How embeddings, attention and norms are made; see `moemerge.planning.shared_weights`."""

    method: Literal["base", "average", "ties", "dare"] = "base"
    weights: list[Annotated[Number, Field(gt=0)]] | None = None
    """Of the experts, in their order; they are divided by their sum. None: all alike."""
    density: Number = Field(0.5, ge=1e-6, le=1)
    """Of `ties` and `dare`: the share of an expert's changes that is kept."""
    seed: int = Field(0, ge=0, strict=True)
    """Of `dare`."""


class MergeConfig(_Strict):
    """A merge: a base model and the experts whose FFNs are stacked into it.

    Made from keys with values, as in the YAML, it is checked as a file is.

    Raises:
        ConfigError: lists every problem with its address.
    """

    base_model: Text
    """Where embeddings, attention, norms and the tokenizer come from."""
    experts: list[RoutedExpert]
    gate_mode: Annotated[str, BeforeValidator(_gate_mode_of)] = AUTO
    """A method of `moemerge.config.router_methods`, or `auto`."""
    dtype: Annotated[DType | None, BeforeValidator(_canonical_dtype)] = None
    """Of the merged model; None keeps the base model's."""
    experts_per_token: int = Field(2, ge=1, strict=True)
    shared_experts: Annotated[list[Expert], BeforeValidator(listed)] = []
    architecture: Text | None = None
    """The output family's `model_type`; None chooses the one that most engines read rightly."""
    engine: Annotated[Engine | None, BeforeValidator(engine_of)] = None
    """The engine that has to read the merged model rightly; None for any."""
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
    _file: Path | None = PrivateAttr(None)
    _checked: dict[str, Any] = PrivateAttr(default_factory=dict)
    _identical: bool = PrivateAttr(default=False)

    def __init__(self, allow_identical_experts: bool = False, /, **document: Any) -> None:
        document, halves = join_halves(_plain(document))
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
        """The same config; one that was changed by `model_copy` is checked as a new one.

        Raises:
            ConfigError: lists every problem with its address.
        """
        if self.model_dump() == self._checked:
            return self
        again = MergeConfig(self._identical, **self.model_dump(by_alias=True))
        again._file = self._file
        return again

    @property
    def file(self) -> Path | None:
        """The file that it was read from."""
        return self._file

    @property
    def text(self) -> str:
        """The YAML that it was read from, or says the same."""
        if self._text and self.model_dump() == self._checked:
            return self._text
        document = self.model_dump(exclude_defaults=True, by_alias=True)
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)

    @property
    def method(self) -> RouterMethod:
        """How its routers are made: by `gate_mode`, or by what `auto` finds to be the best that there is data for."""
        calibrated = bool(self.router.calibration_texts)
        return choose_method(self.gate_mode, described=self.has_descriptions, calibrated=calibrated)

    @property
    def computes_shared_gate(self) -> bool:
        """Whether prompts say when a shared expert that has a gate should speak."""
        return self.method.runs_base and any(expert.is_described for expert in self.shared_experts)

    @property
    def has_descriptions(self) -> bool:
        """Whether prompts or texts say of every expert what should be routed to it."""
        return all(expert.is_described for expert in self.experts)


def load_config(source: Path | str | Mapping[str, Any], *, allow_identical_experts: bool = False) -> MergeConfig:
    """Read and check a merge config.

    Args:
        source: path of a YAML file; or its text, which has several lines or begins with a brace; or keys with values as
            such a file holds them. A `Path` is never taken for text.
        allow_identical_experts: accept experts that are all the same model.

    Raises:
        ConfigError: lists every problem with its address, and its line in a file.
    """
    if isinstance(source, Mapping):
        return _check(dict(source), "config", None, allow_identical_experts)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"config: expected a path, or keys with values, found {SHORT_REPR.repr(source)}.", [])
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return parse_config(source, allow_identical_experts=allow_identical_experts)
    path = Path(source)
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MOST_CHARACTERS)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.", []) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8.", []) from error
    except ValueError as error:  # a null byte in its name
        raise ConfigError(f"{path}: cannot be read: {error}.", []) from error
    config = parse_config(text, str(path), allow_identical_experts=allow_identical_experts)
    config._file = path.absolute()  # noqa: SLF001  its own class's
    return config


def parse_config(text: str, name: str = "config", *, allow_identical_experts: bool = False) -> MergeConfig:
    """Check the text of a merge config; `name` stands for it in messages. See `load_config`."""
    try:
        document, node = read_yaml(text)
    except YamlTextError as error:
        raise ConfigError(f"{name}: not valid YAML:", [str(error)]) from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{name}: expected keys such as base_model and experts, found {SHORT_REPR.repr(document)}.", []
        )
    config = _check(document, name, node, allow_identical_experts)
    config._text = text  # noqa: SLF001  its own class's
    return config


def _check(document: dict[Any, Any], name: str, node: yaml.Node | None, allow_identical_experts: bool) -> MergeConfig:
    problems = list(repeated_keys(node))
    problems += [((str(key),), "is no name of a key: expected text") for key in document if not isinstance(key, str)]
    try:
        config = MergeConfig(
            allow_identical_experts, **{key: value for key, value in document.items() if isinstance(key, str)}
        )
    except PlacedError as error:
        raise PlacedError([*problems, *error.placed], name, node) from None
    if problems:
        raise PlacedError(problems, name, node)
    return config


def _known_keys(place: Place) -> list[str]:
    """Keys that stand beside the one at a place."""
    models: dict[str, type[_Strict]] = {
        "experts": RoutedExpert,
        "shared_experts": Expert,
        "router": RouterSettings,
        "shared_weights": SharedWeights,
    }
    model = models.get(str(place[0]), MergeConfig) if len(place) > 1 else MergeConfig
    return [field.alias or name for name, field in model.model_fields.items()]


def _plain(value: Any, depth: int = 0) -> Any:
    """A document of plain values, also where parts of it are models, or come one by one."""
    if depth > _DEEPEST:
        raise ConfigError(f"config: is nested more than {_DEEPEST} deep.", [])
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(exclude_unset=True, by_alias=True), depth)
    if isinstance(value, Mapping):
        return {key: _plain(held, depth + 1) for key, held in value.items()}
    if isinstance(value, int) and abs(value) >= _LARGEST:  # which Python writes no decimals of
        raise ConfigError("config: holds an integer beyond all floats.", [])
    listed_like = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    return [_plain(held, depth + 1) for held in value] if listed_like else value
