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
    "qwen3_5_moe": Multimodal(("qwen3_5_moe_text",)),
    "gemma4": Multimodal(("gemma4_text",)),
    "mistral3": Multimodal(("mistral", "ministral3")),
    "qwen3_vl": Multimodal(("qwen3_vl_text",)),
    "qwen3_vl_moe": Multimodal(("qwen3_vl_moe_text",)),
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
_TIED: Final = "tie_word_embeddings"
_ROPES: Final = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class VisionMixture:
    """A multimodal class whose text model is a mixture, with the same towers as a class with a dense one."""

    model_type: str
    architecture: str
    family: str
    """The output family of the text model."""
    vision_type: str | None = None
    """The `model_type` of its `vision_config` in released checkpoints; None where it is the dense model's."""
    of_images: tuple[str, ...] = ()
    """Keys of the dense model's `text_config` that matter to images alone, so that a mixture of text lacks them."""
    has_axes: bool = False
    """Whether its rope settings say how positions on several axes share a head, which those of text lack."""
    text_type: str | None = None
    """The `model_type` of its `text_config`; None for that of the output family."""
    stacks_transposed: bool = False
    """Whether experts are stacks of transposed matrices, gate and up side by side: (expert, hidden, 2 width)."""

    def config(self, dense: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
        """Write the `config.json` of the whole.

        Args:
            dense: the `config.json` of the multimodal model whose towers it has.
            text: that of the mixture for text alone.
        """
        of_text = dense["text_config"]
        own = {key: of_text[key] for key in self.of_images if key in of_text}
        if self.has_axes:  # spelled as each version of transformers reads it
            axes = of_text.get("rope_parameters") or of_text.get("rope_scaling") or {}
            own["rope_parameters"] = {"rope_theta": text["rope_theta"], **axes}
            own["rope_scaling"] = {key: value for key, value in axes.items() if key != "rope_theta"}
        vision = {**dense["vision_config"], **({"model_type": self.vision_type} if self.vision_type else {})}
        inner = {**text, "model_type": self.text_type or text["model_type"]}
        del inner["architectures"]
        left = ("transformers_version", "quantization_config", "transformers_weights")
        return {
            **{key: value for key, value in dense.items() if key not in left},
            **{key: text[key] for key in ("dtype", "torch_dtype", _TIED)},
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "text_config": inner | own,
            "vision_config": vision,
        }


VISION_MIXTURES: Final = {
    "qwen3_5": VisionMixture(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", vision_type="qwen3_5_moe"
    ),
    "gemma4": VisionMixture(
        "gemma4", "Gemma4ForConditionalGeneration", "gemma4_text", of_images=("use_bidirectional_attention",)
    ),
    "qwen3_vl": VisionMixture(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_moe",
        vision_type="qwen3_vl_moe",
        has_axes=True,
        text_type="qwen3_vl_moe_text",
        stacks_transposed=True,
    ),
}
"""Multimodal classes with mixtures, by the model type of the class with a dense text model."""

_QWEN2_VL: Final = _TextType("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6})
_TEXT_TYPES: Final = {
    "gemma4_unified_text": _TextType(
        "gemma4_text",
        {"max_position_embeddings": 262144, "sliding_window": 1024, "hidden_size_per_layer_input": 0},
    ),
    "qwen3_vl_text": _TextType("qwen3", {"max_position_embeddings": 128000, "rope_theta": 500000.0}),
    "qwen3_vl_moe_text": _TextType(
        "qwen3_moe", {"max_position_embeddings": 128000, "rope_theta": 500000.0, "norm_topk_prob": True}
    ),
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
    own = {key: value for key, value in inner.items() if not key.startswith("mtp_")}  # of tensors that are left out
    return text_alone({**_SIZES.get(text_type, {}), **own, **inherited, "model_type": text_type})


def text_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Respell the config of a text model whose type occurs only inside multimodal ones; others stay as they are."""
    kind = config.get("model_type")
    own = _TEXT_TYPES.get(kind) if isinstance(kind, str) else None
    if own is None:
        return dict(config)
    plain = {key: _without_axes(value) if key in _ROPES else value for key, value in config.items()}
    given = {key: value for key, value in plain.items() if value is not None}
    settings = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = {"rope_theta": settings["rope_theta"]} if isinstance(settings, dict) and "rope_theta" in settings else {}
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


def has_transposed_stacks(config: Mapping[str, Any]) -> bool:
    """Whether a multimodal model stores its experts as stacks of transposed matrices."""
    stacked = {mixture.model_type for mixture in VISION_MIXTURES.values() if mixture.stacks_transposed}
    return config.get("model_type") in stacked


def disputed_head(config: Mapping[str, Any]) -> bool:
    """Whether a multimodal config and its text model's disagree on tied embeddings; transformers asks the file then."""
    inner = config.get("text_config")
    given = [part.get(_TIED) for part in (config, inner) if isinstance(part, dict)]
    return True in given and False in given


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
