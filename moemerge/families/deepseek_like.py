"""Output families with DeepSeek-V3's router: sigmoids, a bias for the choice alone, ungated shared experts."""

from typing import Any, Final

from moemerge.families.family import COMMON, ROPE, MoeFamily, Shared, separate

_EXPERTS: Final = separate("mlp.experts.{expert}")
_SHARED: Final = Shared(separate("mlp.shared_experts"), "multiple", "zeros")
_BIAS: Final = "mlp.gate.e_score_correction_bias"
_NUMBERS: Final = {
    "intermediate_size": "dense_width",
    "moe_intermediate_size": "expert_width",
    "num_experts_per_tok": "experts_per_token",
}
_NAMED: Final = (
    ROPE
    | _NUMBERS
    | {
        "n_routed_experts": "experts",
        "n_shared_experts": "shared_count",
        "first_k_dense_replace": "dense_prefix",
        "attention_bias": "qkv_bias",
    }
)
_ONE_GROUP: Final[dict[str, Any]] = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}
_FIXED: Final[dict[str, Any]] = _ONE_GROUP | {
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_LAYER_KINDS: Final = {"mlp_layer_types": "mlp_layer_types"}

DOTS1: Final = MoeFamily(
    "dots1",
    "Dots1ForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=_NAMED | {"layer_types": "layer_types", "sliding_window": "window", "max_window_layers": "layers"},
    fixed=_FIXED,
    carried=COMMON,
    holds=frozenset({"qk_norm", "qkv_bias", "output_bias", "window", "mixed_attention", "wide_heads", "scaled_rope"}),
    needs_qk_norm=True,
    scoring="sigmoid",
    shared=_SHARED,
    dense_layers="prefix",
    selection_bias=_BIAS,
    router_defaults={"norm_topk_prob": False},
)
GLM4_MOE: Final = MoeFamily(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=_NAMED
    | {
        "rope_parameters": "rope_with_part",
        "partial_rotary_factor": "rotary_part",
        "use_qk_norm": "qk_norm",
    },
    fixed=_FIXED | {"num_nextn_predict_layers": 0},
    carried=COMMON,
    holds=frozenset({"qk_norm", "qkv_bias", "partial_rotary", "wide_heads", "scaled_rope"}),
    scoring="sigmoid",
    shared=_SHARED,
    dense_layers="prefix",
    selection_bias=_BIAS,
)
SOLAR_OPEN: Final = MoeFamily(
    "solar_open",
    "SolarOpenForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named={key: value for key, value in _NAMED.items() if key != "intermediate_size"},
    # llama.cpp reads it as a GLM, which rotates half of each head if no key says otherwise.
    fixed=_FIXED | {"partial_rotary_factor": 1.0},
    carried=COMMON,
    holds=frozenset({"qkv_bias", "wide_heads", "scaled_rope"}),
    scoring="sigmoid",
    shared=_SHARED,
    selection_bias=_BIAS,
)
HY_V3: Final = MoeFamily(
    "hy_v3",
    "HYV3ForCausalLM",
    experts=_EXPERTS,
    router="mlp.router.gate.weight",
    named=ROPE
    | _NUMBERS
    | _LAYER_KINDS
    | {
        "num_experts": "experts",
        "num_shared_experts": "shared_count",
        # vLLM alone reads these, and two of the fixed ones.
        "first_k_dense_replace": "dense_prefix",
        "expert_hidden_dim": "expert_width",
    },
    fixed={
        "router_scaling_factor": 1.0,
        "enable_moe_fp32_combine": False,
        "attention_bias": False,
        "route_norm": True,
        "qk_norm": True,
    },
    carried=COMMON,
    holds=frozenset({"qk_norm", "wide_heads", "scaled_rope"}),
    needs_qk_norm=True,
    scoring="sigmoid",
    # A count of 0 becomes a full expert of random weights.
    shared=Shared(separate("mlp.shared_mlp"), "multiple", "zeros"),
    dense_layers="any",
    selection_bias="mlp.expert_bias",
    read=("mlp_bias",),
    router_defaults={"router_scaling_factor": 2.826},
)
EXAONE_MOE: Final = MoeFamily(
    "exaone_moe",
    "ExaoneMoEForCausalLM",  # as released; transformers spells its class ExaoneMoe
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=ROPE
    | _NUMBERS
    | _LAYER_KINDS
    | {
        "num_experts": "experts",
        "num_shared_experts": "shared_count",
        "first_k_dense_replace": "dense_prefix",
        "layer_types": "all_sliding",
        "sliding_window": "max_position_embeddings",
        "is_moe_layer": "moe_layer_flags",  # which mlx-lm alone reads
    },
    # Layers without a window do not rotate, so all layers have one, as long as the context.
    fixed=_ONE_GROUP | {"routed_scaling_factor": 1.0, "sliding_window_pattern": 4, "scoring_func": "sigmoid"},
    carried=COMMON,
    holds=frozenset({"qk_norm", "wide_heads", "scaled_rope"}),
    needs_qk_norm=True,
    scoring="sigmoid",
    shared=_SHARED,
    dense_layers="any",
    selection_bias="mlp.e_score_correction_bias",
    router_defaults={"routed_scaling_factor": 2.5},
    notes=("exaone_moe sees no further back than max_position_embeddings",),
)
MIMO_V2_FLASH: Final = MoeFamily(
    "mimo_v2_flash",
    "MiMoV2FlashForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=_NUMBERS
    | _LAYER_KINDS
    | {
        "rope_parameters": "rope_by_kind_with_part",
        "v_head_dim": "head_dim",
        "n_routed_experts": "experts",
        "layer_types": "layer_types",
    },
    fixed=_ONE_GROUP | {"routed_scaling_factor": 1.0, "attention_value_scale": 1.0, "attention_bias": False},
    carried=tuple(key for key in COMMON if not key.startswith("rope_")),
    holds=frozenset({"wide_heads"}),
    scoring="sigmoid",
    dense_layers="any",
    selection_bias=_BIAS,
    in_gguf=False,
    read=("sliding_window", "sliding_window_size"),
)
DEEPSEEK_V3: Final = MoeFamily(
    "deepseek_v3", "DeepseekV3ForCausalLM",
    experts=_EXPERTS,
    router="mlp.gate.weight",
    named=_NAMED,
    # transformers 5 saves this as 1, a layer that is not there.
    fixed=_FIXED | {"num_nextn_predict_layers": 0},
    carried=(
        *COMMON, "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rope_interleave",
    ),
    blocks=("mla",),
    interleaved=True,
    holds=frozenset({"wide_heads", "scaled_rope"}),
    scoring="sigmoid",
    shared=_SHARED,
    dense_layers="prefix",
    selection_bias=_BIAS,
    router_defaults={"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
)  # fmt: skip
