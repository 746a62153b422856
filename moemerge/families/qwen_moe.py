"""Qwen's mixtures: qwen2_moe (Qwen1.5-MoE, Qwen2-57B-A14B), qwen3_moe (Qwen3-30B-A3B), qwen3_5_moe_text, and Mellum."""

from typing import Final

from moemerge.families.family import COMMON, ROPE, SPARSE, MoeFamily, Shared, separate, zero_biases

_EXPERTS: Final = separate("mlp.experts.{expert}")
_NUMBERS: Final = {
    "intermediate_size": "dense_width",
    "moe_intermediate_size": "expert_width",
    "num_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
}
_GATED: Final = Shared(separate("mlp.shared_expert"), "any", "zeros", "mlp.shared_expert_gate.weight")

QWEN2_MOE: Final = MoeFamily(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=ROPE
    | _NUMBERS
    | {
        "shared_expert_intermediate_size": "shared_width",
        "mlp_only_layers": "dense_layers",
        "use_sliding_window": "window_switch",
        "sliding_window": "window",
        "layer_types": "layer_types",
    },
    # vLLM builds the biases whatever qkv_bias says.
    fixed=SPARSE | {"norm_topk_prob": True, "decoder_sparse_step": 1, "qkv_bias": True, "max_window_layers": 0},
    carried=COMMON,
    holds=frozenset({"qkv_bias", "window", "mixed_attention", "wide_heads", "scaled_rope"}),
    shared=_GATED,
    dense_layers="any",
    extras=zero_biases("q", "k", "v"),
    in_gguf=False,
    router_defaults={"norm_topk_prob": False},
)
QWEN3_MOE: Final = MoeFamily(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    # transformers 5 saves num_local_experts alone, which 4.57 does not read.
    named=ROPE
    | _NUMBERS
    | {"num_local_experts": "experts", "mlp_only_layers": "dense_layers", "attention_bias": "qkv_bias"},
    fixed=SPARSE
    | {"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None},
    carried=COMMON,
    holds=frozenset({"qk_norm", "qkv_bias", "output_bias", "wide_heads", "scaled_rope"}),
    needs_qk_norm=True,
    dense_layers="any",
    router_defaults={"norm_topk_prob": False},
)
QWEN3_5_MOE: Final = MoeFamily(
    "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
    experts={"mlp.experts.gate_up_proj": ("gate", "up"), "mlp.experts.down_proj": ("down",)},
    router="mlp.gate.weight",
    named={
        "moe_intermediate_size": "expert_width", "shared_expert_intermediate_size": "shared_width",
        "num_experts": "experts", "num_experts_per_tok": "experts_per_token", "layer_types": "layer_types",
        "full_attention_interval": "full_attention_interval",
    },
    fixed=SPARSE,
    carried=(
        *(key for key in COMMON if not key.startswith("rope_")), "rope_parameters", "attention_bias",
        "partial_rotary_factor", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
        "linear_num_key_heads", "linear_num_value_heads",
    ),
    blocks=("qwen3_5",),
    norm_offset=1.0,
    holds=frozenset({"qkv_bias", "output_bias", "mixed_attention", "wide_heads", "partial_rotary"}),
    shared=_GATED,
    in_gguf=False,
)  # fmt: skip
MELLUM: Final = MoeFamily(
    "mellum",
    "MellumForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=_NUMBERS
    | {
        "rope_parameters": "rope_by_kind",
        "mlp_layer_types": "mlp_layer_types",
        "layer_types": "layer_types",
        "sliding_window": "some_window",
        "attention_bias": "qkv_bias",
    },
    fixed={"norm_topk_prob": True},
    carried=tuple(key for key in COMMON if not key.startswith("rope_")),
    holds=frozenset({"qk_norm", "qkv_bias", "output_bias", "window", "mixed_attention", "wide_heads", "scaled_rope"}),
    needs_qk_norm=True,
    dense_layers="any",
    read=("num_local_experts",),
)
