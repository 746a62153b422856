"""Types of the config's values: what each accepts, in Python and in the JSON Schema, which accepts all of it."""

import struct
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticKnownError

from moemerge.chats import Document, Role
from moemerge.config.chat_prompts import PROMPT_SCHEMA, plain_prompt, read_prompt
from moemerge.config.cross_checks import listed, listed_prompts
from moemerge.config.expert_names import LONGEST_NAME, WRITABLE_NAME, checked_name
from moemerge.config.layer_choice import NAMED_LAYERS, WRITTEN_LAYERS, LayerChoice, read_layers
from moemerge.config.router_methods import METHODS, canonical_gate_mode, gate_modes
from moemerge.dtypes import DTYPE_ALIASES, DType
from moemerge.engines import NAMES, SHORT_NAMES, Engine, engine_of

# The smallest normal number of float32; smaller ones lose digits.
_SMALLEST: Final = 2.0**-126
# As YAML 1.1 reads 1e-2, which is a text there.
_NUMBER_TEXT: Final = r"^\s*[+-]?[0-9_]*\.?[0-9_]*([eE][+-]?[0-9_]+)?\s*$"
_NUMBER_OR_TEXT: Final[dict[str, Any]] = {"type": ["number", "string"], "pattern": _NUMBER_TEXT}


def _words(*names: str) -> Any:
    """A type of texts that the JSON Schema lists."""
    return Annotated[str, WithJsonSchema({"enum": list(dict.fromkeys(names))})]


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004  pydantic's
    return value


def _in_float32(value: float) -> float:
    """Check that a number is neither infinite nor zero in float32, in which it is computed with."""
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


Number = Annotated[
    float,
    BeforeValidator(_no_flag),
    Field(allow_inf_nan=False, json_schema_extra=_NUMBER_OR_TEXT),
    AfterValidator(_in_float32),
]
Text = Annotated[str, Field(strict=True, min_length=1)]
ExpertName = Annotated[
    str,
    Field(strict=True, min_length=1, json_schema_extra={"maxLength": LONGEST_NAME, "pattern": f"^({WRITABLE_NAME})$"}),
    AfterValidator(checked_name),
]
Texts = Annotated[list[Text], BeforeValidator(listed, json_schema_input_type=list[Text] | Text | None)]
Prompt = Annotated[Document, PlainValidator(read_prompt), PlainSerializer(plain_prompt), WithJsonSchema(PROMPT_SCHEMA)]
Prompts = Annotated[list[Prompt], BeforeValidator(listed_prompts, json_schema_input_type=list[Prompt] | Prompt | None)]
Roles = Annotated[list[Role], BeforeValidator(listed, json_schema_input_type=list[Role] | Role), Field(min_length=1)]


ExpertNumber = Annotated[int, Field(ge=0)]
"""The number of an expert in a mixture, from 0."""
Share = Annotated[Number, Field(gt=0, le=1)]
"""A part of a whole."""
Layers = Annotated[
    LayerChoice,
    PlainValidator(
        read_layers,
        json_schema_input_type=_words(*NAMED_LAYERS)
        | Annotated[str, Field(pattern=f"^({WRITTEN_LAYERS})$")]
        | Annotated[int, Field(ge=0)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)],
    ),
]
"""Layers of a model as people write them: see `moemerge.config.layer_choice`."""


def _canonical_dtype(value: Any) -> Any:
    return (
        DTYPE_ALIASES.get(value.removeprefix("torch."), value.removeprefix("torch."))
        if isinstance(value, str)
        else value
    )


DTypeName = Annotated[
    DType | None,
    BeforeValidator(
        _canonical_dtype,
        json_schema_input_type=_words(*get_args(DType), *DTYPE_ALIASES)
        | Annotated[str, Field(pattern=r"^torch\.(b?float16|float32|" + "|".join(DTYPE_ALIASES) + ")$")]
        | None,
    ),
]
"""A dtype in any of its spellings."""


def _gate_mode_of(value: Any) -> str:
    """Check a `gate_mode` against the table of methods, with the error that a `Literal` would give."""
    name, known = canonical_gate_mode(value), gate_modes()
    if isinstance(name, str) and name in known:
        return name
    expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
    raise PydanticKnownError("literal_error", {"expected": expected})


_ALIASES: Final = [alias for method in METHODS.values() for alias in method.aliases]
GateMode = Annotated[str, BeforeValidator(_gate_mode_of, json_schema_input_type=_words(*gate_modes(), *_ALIASES))]
"""A router method, or `auto`."""

# Names are read without regard to case and punctuation; a misspelt one in small letters alone is seen by the schema.
EngineName = Annotated[
    Engine | None,
    BeforeValidator(
        engine_of,
        json_schema_input_type=_words(*NAMES, *SHORT_NAMES) | Annotated[str, Field(pattern="[^a-z]")] | None,
    ),
]
"""An engine in any spelling."""


def _true_false_auto(value: Any) -> Any:
    if not isinstance(value, bool) and value != "auto":
        raise ValueError("expected true, false or auto")
    return value


ChatPrompts = Annotated[
    Literal["auto"] | bool, PlainValidator(_true_false_auto, json_schema_input_type=Literal["auto"] | bool)
]
