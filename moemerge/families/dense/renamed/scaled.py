"""MiniCPM, a Granite whose scales have other names."""

import math
from typing import Any, Final

from moemerge.families.dense.family import Config
from moemerge.families.dense.renamed.family import Renamed

_SCALES: Final = ("scale_emb", "scale_depth", "dim_model_base")
_LARGEST: Final = 1e9


def _minicpm(config: Config) -> dict[str, Any]:
    """Write its three scales as Granite's four, and its longrope, whose factors do not depend on the text's length."""
    layers: Any = config.get("num_hidden_layers")
    width: Any = config.get("head_dim") or _ratio(config.get("hidden_size"), config.get("num_attention_heads"))
    found = {
        "attention_multiplier": _ratio(1.0, math.sqrt(width)) if _is_number(width) else None,
        "embedding_multiplier": config["scale_emb"],
        "residual_multiplier": _ratio(config["scale_depth"], math.sqrt(layers)) if _is_number(layers) else None,
        "logits_scaling": _ratio(config.get("hidden_size"), config["dim_model_base"]),
    }
    rope, context = config.get("rope_scaling"), config.get("max_position_embeddings")
    if isinstance(rope, dict) and "long_factor" in rope:
        original: Any = rope.get("original_max_position_embeddings")
        if _is_number(original) and _is_number(context) and context > original:
            found["rope_scaling"] = rope | {"short_factor": rope["long_factor"]}
    return found


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and 0 < value < _LARGEST


def _ratio(number: Any, divisor: Any) -> Any:
    """Divide a number; what is none is left to the checks of Granite's keys."""
    if not _is_number(divisor):
        return divisor
    return number / divisor if _is_number(number) else number


def _refusals(config: Config) -> str:
    if config.get("num_experts"):
        return f"num_experts is {config['num_experts']!r:.40}: it has experts already"
    if config.get("sparse_config"):
        return (
            "sparse_config: it attends to parts of long texts; without this key in config.json it attends to all of "
            "them, and can be merged"
        )
    return ""


MINICPM: Final = Renamed(
    "minicpm", "granite",
    {"tie_word_embeddings": True, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1},
    values=_minicpm,
    silent=(*_SCALES, "num_experts", "sparse_config"),
    refusals=_refusals,
)  # fmt: skip
"""openbmb/MiniCPM-2B-sft-bf16 and MiniCPM4-8B: embeddings times `scale_emb`, what attention and FFN add times
`scale_depth / sqrt(num_hidden_layers)`, logits of states divided by `hidden_size / dim_model_base`.

Its longrope takes the long factors where the context that the model is made for is longer than the original one.
"""
