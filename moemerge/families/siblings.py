"""Output families that repeat one dense sibling alone: FlexOlmo, ERNIE 4.5, Hunyuan, LFM2, Cohere2, Gemma 4."""

from typing import Final

from moemerge.families.family import COMMON, ROPE, SPARSE, Extra, MoeFamily, Shared, fused, separate

_EXPERTS: Final = separate("mlp.experts.{expert}")
_BIASES: Final = frozenset({"qkv_bias", "output_bias"})

FLEX_OLMO: Final = MoeFamily(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=ROPE
    | {
        "intermediate_size": "expert_width",
        "num_experts": "experts",
        "num_experts_per_tok": "experts_per_token",
        "attention_bias": "qkv_bias",
    },
    fixed=SPARSE | {"norm_topk_prob": True},
    carried=COMMON,
    blocks=("olmo2",),
    holds=_BIASES | {"scaled_rope"},
    in_gguf=False,
    router_defaults={"norm_topk_prob": False},
)
ERNIE4_5_MOE: Final = MoeFamily(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=ROPE
    | {
        "intermediate_size": "dense_width",
        "moe_intermediate_size": "expert_width",
        "moe_num_experts": "experts",
        "moe_k": "experts_per_token",
        "moe_num_shared_experts": "shared_count",
        "moe_layer_start_index": "first_moe_layer",
        "moe_layer_end_index": "last_moe_layer",
    },
    fixed=SPARSE | {"moe_layer_interval": 1, "moe_norm_min": 1e-12, "use_bias": False},
    carried=COMMON,
    interleaved=True,
    holds=frozenset({"wide_heads", "scaled_rope"}),
    shared=Shared(separate("mlp.shared_experts"), "multiple", "nothing"),
    dense_layers="outside",
    selection_bias="mlp.moe_statics.e_score_correction_bias",
    bias_axes=("1", "experts"),
    router_defaults={"moe_norm_min": 1e-12},
)
HUNYUAN_V1_MOE: Final = MoeFamily(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.wg.weight",
    named=ROPE
    | {
        "intermediate_size": "expert_width",
        "moe_intermediate_size": "by_layer.expert_width",
        "num_experts": "experts",
        "moe_topk": "by_layer.experts_per_token",
        "num_shared_expert": "by_layer.shared_count",
        "attention_bias": "qkv_bias",
        "attention_head_dim": "head_dim",
    },
    fixed={"use_mixed_mlp_moe": True, "use_qk_norm": True},
    carried=COMMON,
    blocks=("hunyuan",),
    holds=_BIASES | {"wide_heads", "scaled_rope"},
    shared=Shared(separate("mlp.shared_mlp"), "one expert", "zeros"),
)
LFM2_MOE: Final = MoeFamily(
    "lfm2_moe", "Lfm2MoeForCausalLM",
    experts=separate("feed_forward.experts.{expert}", ("w1", "w3", "w2")),
    router="feed_forward.gate.weight",
    named=ROPE
    | {
        "intermediate_size": "dense_width", "moe_intermediate_size": "expert_width", "num_experts": "experts",
        "num_experts_per_tok": "experts_per_token", "num_dense_layers": "dense_prefix", "layer_types": "layer_types",
    },
    fixed={"use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
    carried=(
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "initializer_range", "norm_eps", "use_cache", "pad_token_id", "bos_token_id",
        "eos_token_id", "tie_word_embeddings", "rope_theta", "conv_bias", "conv_L_cache",
    ),
    blocks=("lfm2",),
    holds=frozenset({"mixed_attention"}),
    scoring="sigmoid",
    dense_layers="prefix",
    dense_ffn=separate("feed_forward", ("w1", "w3", "w2")),
    selection_bias="feed_forward.expert_bias",
    read=("tie_embedding",),
    added_to_sum=1e-6,
    notes=("lfm2_moe divides the weights of the chosen experts by their sum and 1e-6",),
)  # fmt: skip
COHERE2_MOE: Final = MoeFamily(
    "cohere2_moe", "Cohere2MoeForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=ROPE
    | {
        "intermediate_size": "expert_width", "prefix_dense_intermediate_size": "dense_width", "num_experts": "experts",
        "num_experts_per_tok": "experts_per_token", "num_shared_experts": "shared_count",
        "mlp_layer_types": "mlp_layer_types", "layer_types": "layer_types", "sliding_window": "window",
        "attention_bias": "qkv_bias",
    },
    fixed={
        "shared_expert_combination_strategy": "sum", "expert_selection_fn": "softmax", "norm_topk_prob": True,
        "prefix_dense_sliding_window_pattern": 4,
    },
    carried=(*(key for key in COMMON if key != "rms_norm_eps"), "layer_norm_eps", "logit_scale"),
    blocks=("cohere2",),
    interleaved=True,
    holds=_BIASES | {"window", "mixed_attention", "wide_heads", "scaled_rope"},
    shared=Shared(separate("mlp.shared_experts"), "multiple", "nothing"),
    dense_layers="any",
    read=("rms_norm_eps", "sliding_window_pattern", "first_k_dense_replace"),
)  # fmt: skip
_NORM: Final = "{}_feedforward_layernorm{}.weight"
GEMMA4_MOE: Final = MoeFamily(
    "gemma4_text", "Gemma4ForCausalLM",
    experts=fused("experts.gate_up_proj", "experts.down_proj"),
    router="router.proj.weight",
    named={
        "moe_intermediate_size": "expert_width", "intermediate_size": "dense_width", "num_experts": "experts",
        "top_k_experts": "experts_per_token", "layer_types": "layer_types", "global_head_dim": "global_head_dim",
        "num_global_key_value_heads": "num_global_key_value_heads",
    },
    fixed={"enable_moe_block": True},
    carried=(
        *(key for key in COMMON if not key.startswith(("rope_", "hidden_act"))), "rope_parameters",
        "hidden_activation", "attention_bias", "sliding_window", "final_logit_softcapping",
        "vocab_size_per_layer_input", "hidden_size_per_layer_input", "attention_k_eq_v", "num_kv_shared_layers",
        "use_double_wide_mlp", "per_layer_config",
    ),
    blocks=("gemma4",),
    holds=frozenset({"window", "mixed_attention", "wide_heads", "layer_inputs", "shared_keys", "wide_ffns"}),
    keeps_dense_ffn=True,
    # The dense FFN is a branch with a norm of its own, whose weight is 0; router and experts have the same input.
    extras=(
        Extra(_NORM.format("post", "_1"), ("hidden",), 0.0),
        Extra(_NORM.format("post", "_2"), ("hidden",), 1.0),
        Extra(_NORM.format("pre", "_2"), ("hidden",), source=_NORM.format("pre", "")),
        Extra("router.scale", ("hidden",), source=_NORM.format("pre", ""), scale="sqrt hidden"),
        Extra("router.per_expert_scale", ("experts",), 1.0),
    ),
    read=("use_bidirectional_attention",),
    weight_factors="router.per_expert_scale",
)  # fmt: skip
