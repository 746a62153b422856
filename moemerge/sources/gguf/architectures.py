"""Dense families as llama.cpp's converter writes them, read the other way round: names of tensors and keys.

Names within a layer begin with `blk.{layer}.` in the file and with `model.layers.{layer}.` in transformers.
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

Names = Mapping[str, str]
"""Names in transformers by names in the file."""

_PROJECTIONS: Final = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
_NORMS: Final = {"attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
_ATTENTION: Final = {
    f"{name}.{kind}": f"self_attn.{own}.{kind}" for name, own in _PROJECTIONS.items() for kind in ("weight", "bias")
}
_FFN: Final = {
    f"ffn_{role}.{kind}": f"mlp.{role}_proj.{kind}" for role in ("gate", "up", "down") for kind in ("weight", "bias")
}
_QK_NORMS: Final = {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in ("q", "k")}
_LAYER: Final = {**_NORMS, **_ATTENTION, **_FFN}

WHOLE: Final[Names] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Tensors outside of the layers."""


@dataclass(frozen=True)
class Architecture:
    """A dense family in GGUF."""

    model_type: str
    class_name: str
    """The class of transformers, as `architectures` in `config.json` names it."""
    layer: Names = field(default_factory=lambda: _LAYER)
    """Tensors within a layer."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further keys of `config.json`, by the file's keys without the architecture's name."""
    turned: bool = False
    """Whether rows of query and key heads were put into pairs of neighbours."""
    bias: str = ""
    """The key of `config.json` that says whether attention has biases; empty where the family decides it."""


_POST_NORMS: Final = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_GRANITE_SCALES: Final = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("llama", "LlamaForCausalLM", turned=True, bias="attention_bias"),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_LAYER, **_QK_NORMS}, bias="attention_bias"),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", keys=_GRANITE_SCALES, turned=True, bias="attention_bias"
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", turned=True, bias="attention_bias"),
    "olmo2": Architecture(
        "olmo2", "Olmo2ForCausalLM", {**_ATTENTION, **_FFN, **_QK_NORMS, **_POST_NORMS}, bias="attention_bias"
    ),
    "seed_oss": Architecture(
        "seed_oss", "SeedOssForCausalLM",
        {**_LAYER, "post_attention_norm.weight": "post_attention_layernorm.weight"}, bias="attention_bias",
    ),
}  # fmt: skip
"""Families by llama.cpp's names."""
