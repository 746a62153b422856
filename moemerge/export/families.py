"""Output families in GGUF: which of a checkpoint's tensors each tensor of the file is made of, and keys of their own.

Names of llama.cpp, as its converter gives them; names within a layer begin with `blk.{layer}.` there and with
`model.layers.{layer}.` in the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Part:
    """What a tensor of the file is made of."""

    source: str
    """A tensor of the checkpoint; one with `{expert}` is a stack of those of all experts."""
    turned: Literal["", "query", "key"] = ""
    """Whose heads its rows belong to, if these are put into pairs of neighbours for rotary positions."""
    half: Literal["", "first", "second"] = ""
    """Which rows of it, or of every expert in a stack: gate and up projections may be stored as one."""
    needed: bool = True
    """Whether every layer of the kind has it."""


Names = dict[str, Part]


@dataclass(frozen=True)
class GgufFamily:
    """An output family as llama.cpp knows it."""

    architecture: str
    """llama.cpp's name for it, with which its own keys begin."""
    layer: Names
    """Within a layer."""
    keys: tuple[tuple[str, str], ...] = ()
    """Further keys: the method of `gguf.GGUFWriter` that adds one, and which key of `config.json` has its value; where
    that is not there, or 0, it is left out."""
    has_rope_dimensions: bool = False
    """Whether the size of the vocabulary and of rotary heads are keys."""
    ignores_head_dim: bool = False
    """Whether heads are always as wide as the hidden state through their number."""


def _optional(source: str) -> Part:
    return Part(source, needed=False)


def _stacked(module: str, names: tuple[str, str, str]) -> Names:
    gate, up, down = (Part(f"{module}.{{expert}}.{name}.weight") for name in names)
    return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up, "ffn_down_exps.weight": down}


WHOLE: Final[Names] = {
    "token_embd.weight": Part("model.embed_tokens.weight"),
    "output_norm.weight": Part("model.norm.weight"),
    "output.weight": _optional("lm_head.weight"),
}
"""Outside of the layers."""
_NORMS: Final[Names] = {
    "attn_norm.weight": Part("input_layernorm.weight"), "ffn_norm.weight": Part("post_attention_layernorm.weight"),
}  # fmt: skip
_ATTENTION: Final[Names] = {
    "attn_q.weight": Part("self_attn.q_proj.weight"), "attn_q.bias": _optional("self_attn.q_proj.bias"),
    "attn_k.weight": Part("self_attn.k_proj.weight"), "attn_k.bias": _optional("self_attn.k_proj.bias"),
    "attn_v.weight": Part("self_attn.v_proj.weight"), "attn_v.bias": _optional("self_attn.v_proj.bias"),
    "attn_output.weight": Part("self_attn.o_proj.weight"), "attn_output.bias": _optional("self_attn.o_proj.bias"),
}  # fmt: skip
_TURNED: Final[Names] = _ATTENTION | {
    "attn_q.weight": Part("self_attn.q_proj.weight", "query"),
    "attn_q.bias": Part("self_attn.q_proj.bias", "query", needed=False),
    "attn_k.weight": Part("self_attn.k_proj.weight", "key"),
    "attn_k.bias": Part("self_attn.k_proj.bias", "key", needed=False),
}
_QK_NORMS: Final[Names] = {
    "attn_q_norm.weight": Part("self_attn.q_norm.weight"), "attn_k_norm.weight": Part("self_attn.k_norm.weight"),
}  # fmt: skip
_GRANITE: Final[Names] = _NORMS | _TURNED | {
    "ffn_gate_inp.weight": Part("block_sparse_moe.router.layer.weight"),
    "ffn_gate_exps.weight": Part("block_sparse_moe.input_linear.weight", half="first"),
    "ffn_up_exps.weight": Part("block_sparse_moe.input_linear.weight", half="second"),
    "ffn_down_exps.weight": Part("block_sparse_moe.output_linear.weight"),
    "ffn_gate_shexp.weight": Part("shared_mlp.input_linear.weight", half="first", needed=False),
    "ffn_up_shexp.weight": Part("shared_mlp.input_linear.weight", half="second", needed=False),
    "ffn_down_shexp.weight": _optional("shared_mlp.output_linear.weight"),
}  # fmt: skip
_MULTIPLIERS: Final = (
    ("add_attention_scale", "attention_multiplier"), ("add_embedding_scale", "embedding_multiplier"),
    ("add_residual_scale", "residual_multiplier"), ("add_logit_scale", "logits_scaling"),
    ("add_expert_shared_feed_forward_length", "shared_intermediate_size"),
)  # fmt: skip
_GRANITE_MOE: Final = GgufFamily(
    "granitemoe", _GRANITE, keys=_MULTIPLIERS, has_rope_dimensions=True, ignores_head_dim=True,
)  # fmt: skip
_QWEN_MOE: Final[Names] = {
    "ffn_gate_inp.weight": Part("mlp.gate.weight"),
    **_stacked("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}

GGUF_FAMILIES: Final[Mapping[str, GgufFamily]] = {
    "mixtral": GgufFamily(
        "llama",
        _NORMS | _TURNED | {
            "ffn_gate_inp.weight": Part("block_sparse_moe.gate.weight"),
            **_stacked("block_sparse_moe.experts", ("w1", "w3", "w2")),
        },
        has_rope_dimensions=True,
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "qwen3_moe": GgufFamily(
        "qwen3moe", _NORMS | _ATTENTION | _QK_NORMS | _QWEN_MOE,
        keys=(("add_expert_feed_forward_length", "moe_intermediate_size"),),
    ),
}  # fmt: skip
"""By `model_type`."""
