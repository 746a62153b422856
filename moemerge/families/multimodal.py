"""Multimodal models: the part of their `config.json` that describes the text model inside, as that of a dense one.

For each of these classes `tests/families/test_multimodal.py` compares what transformers computes of text with what it
computes of the text model alone. Keys and defaults are those of transformers 4.57.6 and 5.23.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class Multimodal:
    """A multimodal class whose logits of text are those of its text model."""

    text_types: tuple[str, ...]
    """Model types that its text model may have, the one of a `text_config` that names none first."""
    is_flat: bool = False
    """Whether old files of the class have the text model's keys beside the others, and no `text_config`."""


@dataclass(frozen=True)
class _TextType:
    """The type of a text model that occurs only inside a multimodal one."""

    computed_as: str
    """The dense type that computes the same of text, where a token has the same position on all axes."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The meaning of absent keys, where it is not that of the dense type."""


_PLAIN: Final = ("llama", "mistral", "ministral3", "qwen2", "qwen3")
MULTIMODAL: Final = {
    "qwen3_5": Multimodal(("qwen3_5_text",)),
    "gemma4": Multimodal(("gemma4_text",)),
    "mistral3": Multimodal(("mistral", "ministral3")),
    "qwen3_vl": Multimodal(("qwen3_vl_text",)),
    "qwen2_5_vl": Multimodal(("qwen2_5_vl_text",), is_flat=True),
    "qwen2_vl": Multimodal(("qwen2_vl_text",), is_flat=True),
    "internvl": Multimodal(("qwen2", "qwen3")),
    "lfm2_vl": Multimodal(("lfm2",)),
    "idefics3": Multimodal(("llama",)),
    "smolvlm": Multimodal(("llama",)),
    "voxtral": Multimodal(("llama",)),
    "gemma4_unified": Multimodal(("gemma4_unified_text",)),
    **dict.fromkeys(("llava", "llava_next"), Multimodal(_PLAIN)),
    "llava_onevision": Multimodal(("qwen2",)),
}
"""Multimodal classes by model type. Others scale the text's logits differently (Cohere), or were not tried."""

_QWEN2_VL: Final = _TextType("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6})
_TEXT_TYPES: Final = {
    "gemma4_unified_text": _TextType(
        "gemma4_text",
        {"max_position_embeddings": 262144, "sliding_window": 1024, "hidden_size_per_layer_input": 0},
    ),
    "qwen3_vl_text": _TextType("qwen3", {"max_position_embeddings": 128000, "rope_theta": 500000.0}),
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
}
# Sizes that the text models of the first LLaVA models leave out.
_SIZES: Final = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}  # fmt: skip
# What a text model inherits where it does not say it itself.
_INHERITED: Final = (
    "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config",
    "transformers_weights", "tie_word_embeddings",
)  # fmt: skip
_TIED: Final = "tie_word_embeddings"
_ROPES: Final = ("rope_scaling", "rope_parameters")


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the `config.json` of the text model inside a multimodal one; None for a model that is no such.

    A text model whose type occurs only inside multimodal ones becomes the dense type that computes the same.
    """
    outer = _outer(config.get("model_type"))
    if outer is None:
        return None
    inner = config.get("text_config")
    if inner is None and outer.is_flat:
        inner = {key: value for key, value in config.items() if not _is_of_vision(key)} | {"model_type": None}
    if not isinstance(inner, dict):
        return None
    text_type = inner.get("model_type") or outer.text_types[0]
    if text_type not in outer.text_types:
        return None
    inherited = {key: config[key] for key in _INHERITED if key in config and inner.get(key) is None}
    return text_alone({**_SIZES.get(text_type, {}), **inner, **inherited, "model_type": text_type})


def text_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Respell the config of a text model whose type occurs only inside multimodal ones; others stay as they are."""
    kind = config.get("model_type")
    own = _TEXT_TYPES.get(kind) if isinstance(kind, str) else None
    if own is None:
        return dict(config)
    plain = {key: _without_axes(value) if key in _ROPES else value for key, value in config.items()}
    given = {key: value for key, value in plain.items() if value is not None}
    settings = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = {"rope_theta": settings["rope_theta"]} if "rope_theta" in settings else {}
    return {**own.defaults, **plain, **{key: given[key] for key in own.defaults if key in given}, **theta} | {
        "model_type": own.computed_as
    }


def dense_types(model_type: str) -> tuple[str, ...]:
    """The dense types that text models inside a multimodal class are read as, or a type that occurs only there."""
    outer = _outer(model_type)
    types = outer.text_types if outer else (model_type,)
    return tuple(_TEXT_TYPES[text].computed_as if text in _TEXT_TYPES else text for text in types)


def why_no_text(model_type: Any, text_type: Any) -> str:
    """Say why the text model inside a multimodal one is not read, and inside which ones it would be."""
    found = f"it is multimodal (model_type {model_type!r:.40}), with a text model of type {text_type!r:.40}"
    if outer := _outer(model_type):
        return f"{found}; of such models, those with {' or '.join(outer.text_types)} are read"
    return f"{found}; text models are read inside {', '.join(MULTIMODAL)}"


def disputed_head(config: Mapping[str, Any]) -> bool:
    """Whether a multimodal config and its text model's disagree on tied embeddings; transformers asks the file then."""
    inner = config.get("text_config")
    given = [part.get(_TIED) for part in (config, inner) if isinstance(part, dict)]
    return set(given) >= {True, False}


def _outer(model_type: Any) -> Multimodal | None:
    """The multimodal class of a type; transformers 4.57 writes `lfm2-vl`."""
    return MULTIMODAL.get(model_type.replace("-", "_")) if isinstance(model_type, str) else None


def _is_of_vision(key: str) -> bool:
    of_text = key in {"bos_token_id", "eos_token_id", "pad_token_id"}
    return key == "vision_config" or (key.endswith("_token_id") and not of_text)


def _without_axes(settings: Any) -> Any:
    """Leave out of rope settings how positions on several axes share a head, which are equal in text."""
    if not isinstance(settings, dict):
        return settings
    plain = {key: value for key, value in settings.items() if not key.startswith("mrope_")}
    plain |= {key: "default" for key in ("type", "rope_type") if plain.get(key) == "mrope"}
    return plain
