"""IBM's mixtures: granitemoe, granitemoeshared, granitemoehybrid, granitemoe_swa; experts stacked as released."""

from typing import Any, Final

from moemerge.families.family import COMMON, ROPE, SPARSE, Extra, MoeFamily, Shared, fused, zero_biases

_EXPERTS: Final = fused("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
_ROUTER: Final = "block_sparse_moe.router.layer.weight"
_SHARED_NAMES: Final = fused("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")
_NUMBERS: Final = {
    "intermediate_size": "expert_width",
    "num_local_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "attention_bias": "any_bias",
    "attention_multiplier": "attention_multiplier",
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_scaling",
}
_SHARED_WIDTH: Final = {"shared_intermediate_size": "shared_width"}
_HOLDS: Final = frozenset({"qkv_bias", "output_bias", "multipliers", "wide_heads", "scaled_rope"})
# One key switches all four on.
_BIASES: Final = zero_biases("q", "k", "v", "o", when=("qkv_bias", "output_bias"))
_MAMBA: Final[dict[str, Any]] = {
    "mamba_n_heads": 1, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": "auto", "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
}  # fmt: skip

GRANITEMOE: Final = MoeFamily(
    "granitemoe",
    "GraniteMoeForCausalLM",
    experts=_EXPERTS,
    router=_ROUTER,
    named=ROPE | _NUMBERS,
    fixed=SPARSE,
    carried=COMMON,
    holds=_HOLDS,
    extras=_BIASES,
)
GRANITEMOESHARED: Final = MoeFamily(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    experts=_EXPERTS,
    router=_ROUTER,
    named=ROPE | _NUMBERS | _SHARED_WIDTH,
    fixed=SPARSE,
    carried=COMMON,
    holds=_HOLDS,
    shared=Shared(_SHARED_NAMES, "any", "nothing"),
    extras=_BIASES,
)
GRANITEMOEHYBRID: Final = MoeFamily(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    experts=_EXPERTS,
    router=_ROUTER,
    named=ROPE
    | _NUMBERS
    | _SHARED_WIDTH
    | {
        "layer_types": "granite_kinds",
        "position_embedding_type": "positions",
        "mamba_d_head": "mamba_d_head",
    },
    fixed=SPARSE | _MAMBA,
    carried=(*COMMON, *_MAMBA, "time_step_limit"),
    blocks=("granitemoehybrid", "llama"),
    holds=_HOLDS | {"mixed_attention"},
    shared=Shared(_SHARED_NAMES, "any", "zeros"),
    extras=_BIASES,
    kinds={"linear_attention": "mamba", "full_attention": "attention"},
)
GRANITEMOE_SWA: Final = MoeFamily(
    "granitemoe_swa",
    "GraniteMoeSWAForCausalLM",
    experts=fused("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    router="block_sparse_moe.router.weight",
    named=ROPE
    | _NUMBERS
    | _SHARED_WIDTH
    | {"sliding_window": "some_window", "layer_types": "layer_types", "layer_rope_theta": "layer_rope_theta"},
    fixed=SPARSE,
    carried=COMMON,
    holds=(_HOLDS | {"window", "mixed_attention", "nope", "sinks"}) - {"scaled_rope"},
    shared=Shared(_SHARED_NAMES, "any", "nothing"),
    # The exponential of such sinks is 0.
    extras=(*_BIASES, Extra("self_attn.sinks", ("heads",), -1e4)),
)
