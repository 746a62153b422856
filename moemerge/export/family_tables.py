"""The output families that are written as GGUF files, as data."""

from collections.abc import Mapping
from typing import Final

from moemerge.export.families import GgufFamily, Part, grouped, optional, separate
from moemerge.export.names import (
    ATTENTION,
    BIASES,
    CHOICE,
    DENSE,
    EXPERTS,
    NORMS,
    OPTIONAL_QK_NORMS,
    PROJECTIONS,
    QK_NORMS,
    ROUTED,
    SHARED,
    TURNED,
    UNTIED,
    WHOLE,
)
from moemerge.export.values import (
    LLAMA3,
    MSCALE,
    constant,
    dense_lead,
    ends_dense,
    first_of,
    has_grouped_heads,
    has_late_dense,
    has_no_shared,
    has_no_window,
    has_shared,
    has_wide_heads,
    has_window,
    has_yarn,
    head_width,
    heads_by_layer,
    is_partly_unrotated,
    is_sliding,
    key_head_width,
    key_width,
    rotated_width,
    shared_width,
    state_width,
    truthy,
    yarn_log_factor,
)

_EXPERT_WIDTH: Final = ("add_expert_feed_forward_length", "moe_intermediate_size")
_VOCAB_SIZE: Final = ("add_vocab_size", "vocab_size")
_WINDOW: Final = (("add_sliding_window", "sliding_window"), ("add_sliding_window_pattern", is_sliding))
_DENSE_PREFIX: Final = ("add_leading_dense_block_count", "first_k_dense_replace")
_ROTATED: Final = ("add_rope_dimension_count", head_width)
_WEIGHTS: Final = (
    ("add_expert_weights_scale", "routed_scaling_factor"), ("add_expert_weights_norm", "norm_topk_prob"),
)  # fmt: skip
_SIGMOID: Final = ("add_expert_gating_func", constant("SIGMOID"))
_WITHOUT_SHARED: Final = (has_no_shared, "does not load it without a shared expert")
_WITHOUT_WINDOW: Final = (has_no_window, "does not load it where no layer has a window")
_WINDOW_IGNORED: Final = (
    has_window,
    "llama.cpp ignores its window: it is right for texts up to {sliding_window} tokens",
)
_LATE_DENSE: Final = (has_late_dense, "does not load it with dense layers after others")

MIXTRAL: Final = GgufFamily(
    "llama",
    NORMS | TURNED | {
        "ffn_gate_inp.weight": Part("block_sparse_moe.gate.weight"),
        **separate("block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), "_exps"),
    },
    WHOLE, keys=(_VOCAB_SIZE, _ROTATED), knows=frozenset({LLAMA3}), is_llama=True, notes=(_WINDOW_IGNORED,),
)  # fmt: skip
_GRANITE_KEYS: Final = (
    _VOCAB_SIZE, _ROTATED, ("add_attention_scale", truthy("attention_multiplier")),
    ("add_embedding_scale", truthy("embedding_multiplier")), ("add_residual_scale", truthy("residual_multiplier")),
    ("add_logit_scale", truthy("logits_scaling")),
    ("add_expert_shared_feed_forward_length", truthy("shared_intermediate_size")),
)  # fmt: skip
_HEADS: Final = (has_wide_heads, "takes head_dim for hidden_size / num_attention_heads")
GRANITE_MOE: Final = GgufFamily(
    "granitemoe",
    NORMS | TURNED | {
        "ffn_gate_inp.weight": Part("block_sparse_moe.router.layer.weight"),
        "ffn_gate_exps.weight": Part("block_sparse_moe.input_linear.weight", half="first"),
        "ffn_up_exps.weight": Part("block_sparse_moe.input_linear.weight", half="second"),
        "ffn_down_exps.weight": Part("block_sparse_moe.output_linear.weight"),
        "ffn_gate_shexp.weight": Part("shared_mlp.input_linear.weight", half="first", needed=False),
        "ffn_up_shexp.weight": Part("shared_mlp.input_linear.weight", half="second", needed=False),
        "ffn_down_shexp.weight": optional("shared_mlp.output_linear.weight"),
    },
    WHOLE, keys=_GRANITE_KEYS, replaces=(("head_dim", constant(None)),), is_llama=True, refuses=(_HEADS,),
)  # fmt: skip
# One that attends in every layer is a granitemoe; of layers with states it has the settings all the same.
GRANITE_HYBRID: Final = GgufFamily(
    "granitemoe", GRANITE_MOE.layer, WHOLE,
    keys=(
        *_GRANITE_KEYS, ("add_ssm_conv_kernel", "mamba_d_conv"), ("add_ssm_state_size", "mamba_d_state"),
        ("add_ssm_group_count", "mamba_n_groups"), ("add_ssm_inner_size", state_width),
        ("add_ssm_time_step_rank", "mamba_n_heads"), ("add_rope_scaling_finetuned", constant(value=True)),
    ),
    replaces=(("head_dim", constant(None)), ("num_key_value_heads", heads_by_layer)), refuses=(_HEADS,),
)  # fmt: skip
QWEN3_MOE: Final = GgufFamily(
    "qwen3moe", NORMS | ATTENTION | QK_NORMS | ROUTED, WHOLE, keys=(_EXPERT_WIDTH,),
)  # fmt: skip
_GLM_KEYS: Final = (
    ("add_rope_dimension_count", rotated_width), _EXPERT_WIDTH, ("add_expert_shared_count", "n_shared_experts"),
    _DENSE_PREFIX, _SIGMOID, *_WEIGHTS, ("add_nextn_predict_layers", "num_nextn_predict_layers"),
)  # fmt: skip
GLM4_MOE: Final = GgufFamily(
    "glm4moe",
    {
        "attn_norm.weight": NORMS["attn_norm.weight"], "post_attention_norm.weight": NORMS["ffn_norm.weight"],
        **ATTENTION, **BIASES, **OPTIONAL_QK_NORMS, **DENSE, **ROUTED, **CHOICE, **SHARED,
    },
    WHOLE, keys=_GLM_KEYS,
    named_tokens=(
        ("bos", "[gMASK]"), ("eot", "<|user|>"), ("unk", "<|endoftext|>"), ("eom", "<|observation|>"),
    ),
    refuses=(_WITHOUT_SHARED,),
)  # fmt: skip
SOLAR_OPEN: Final = GgufFamily(
    "glm4moe", GLM4_MOE.layer, WHOLE, keys=_GLM_KEYS,
    named_tokens=(
        ("eos", "<|endoftext|>"), ("eot", "<|endoftext|>"), ("unk", "<unk>"), ("bos", "<|startoftext|>"),
    ),
    refuses=(_WITHOUT_SHARED,),
)  # fmt: skip
DOTS1: Final = GgufFamily(
    "dots1", NORMS | ATTENTION | QK_NORMS | DENSE | ROUTED | CHOICE | SHARED, UNTIED,
    keys=(_EXPERT_WIDTH, _DENSE_PREFIX, ("add_expert_shared_count", "n_shared_experts"), *_WEIGHTS),
    refuses=(_WITHOUT_SHARED, (has_grouped_heads, "does not load it with fewer key heads than query heads")),
    notes=(_WINDOW_IGNORED,),
)  # fmt: skip
ERNIE4_5_MOE: Final = GgufFamily(
    "ernie4_5-moe",
    NORMS | ATTENTION | DENSE | ROUTED
    | grouped("routed", {"exp_probs_b.bias": Part("mlp.moe_statics.e_score_correction_bias")}),
    WHOLE,
    keys=(
        ("add_expert_count", "moe_num_experts"), ("add_expert_used_count", "moe_k"),
        ("add_interleave_moe_layer_step", "moe_layer_interval"),
        ("add_leading_dense_block_count", "moe_layer_start_index"), _EXPERT_WIDTH,
        ("add_expert_shared_count", "moe_num_shared_experts"),
    ),
    is_llama=True,
    refuses=(
        (has_shared, "does not load it with a shared expert"),
        (ends_dense, "does not load it with dense layers after others"),
    ),
)  # fmt: skip
LFM2_MOE: Final = GgufFamily(
    "lfm2moe",
    {
        "attn_norm.weight": Part("operator_norm.weight"), "ffn_norm.weight": Part("ffn_norm.weight"),
        **grouped("attention", {
            "attn_q.weight": Part("self_attn.q_proj.weight"), "attn_k.weight": Part("self_attn.k_proj.weight"),
            "attn_v.weight": Part("self_attn.v_proj.weight"), "attn_output.weight": Part("self_attn.out_proj.weight"),
            "attn_q_norm.weight": Part("self_attn.q_layernorm.weight"),
            "attn_k_norm.weight": Part("self_attn.k_layernorm.weight"),
        }),
        **grouped("convolution", {
            "shortconv.conv.weight": Part("conv.conv.weight", squeezed=True),
            "shortconv.in_proj.weight": Part("conv.in_proj.weight"),
            "shortconv.out_proj.weight": Part("conv.out_proj.weight"),
        }),
        **grouped("dense", separate("feed_forward", ("w1", "w3", "w2"))),
        **grouped("routed", {
            "ffn_gate_inp.weight": Part("feed_forward.gate.weight"),
            "exp_probs_b.bias": Part("feed_forward.expert_bias"),
            **separate("feed_forward.experts.{expert}", ("w1", "w3", "w2"), "_exps"),
        }),
    },
    {
        "token_embd.weight": Part("model.embed_tokens.weight"),
        "token_embd_norm.weight": Part("model.embedding_norm.weight"),
    },
    keys=(
        _EXPERT_WIDTH, ("add_leading_dense_block_count", "num_dense_layers"), _SIGMOID, _VOCAB_SIZE,
        ("add_shortconv_l_cache", "conv_L_cache"),
    ),
    replaces=(("num_key_value_heads", heads_by_layer),),
)  # fmt: skip
COHERE2_MOE: Final = GgufFamily(
    "cohere2moe",
    {"attn_norm.weight": NORMS["attn_norm.weight"], **ATTENTION, **DENSE, **ROUTED},
    WHOLE,
    keys=(
        ("add_logit_scale", "logit_scale"), *_WINDOW, _VOCAB_SIZE,
        ("add_expert_feed_forward_length", "intermediate_size"), ("add_leading_dense_block_count", dense_lead),
        ("add_expert_weights_norm", "norm_topk_prob"), _ROTATED, ("add_rope_scaling_type", constant("NONE")),
    ),
    refuses=(_LATE_DENSE,),
)  # fmt: skip
MELLUM: Final = GgufFamily(
    "mellum", NORMS | ATTENTION | QK_NORMS | ROUTED, UNTIED, keys=(_EXPERT_WIDTH, *_WINDOW),
    refuses=(
        _WITHOUT_WINDOW,
        (has_yarn, "computes something else where rotary positions are scaled by yarn"),
    ),
)  # fmt: skip
EXAONE_MOE: Final = GgufFamily(
    "exaone-moe",
    NORMS | ATTENTION | QK_NORMS | DENSE | ROUTED | SHARED
    | grouped("routed", {"exp_probs_b.bias": Part("mlp.e_score_correction_bias")}),
    WHOLE,
    keys=(
        _VOCAB_SIZE, *_WINDOW, _EXPERT_WIDTH, ("add_expert_shared_count", "num_shared_experts"),
        ("add_expert_shared_feed_forward_length", shared_width), *_WEIGHTS, _DENSE_PREFIX,
        ("add_nextn_predict_layers", constant(0)), ("add_rope_scaling_type", constant("NONE")),
    ),
    knows=frozenset({LLAMA3}), refuses=(_WITHOUT_SHARED, _LATE_DENSE),
)  # fmt: skip
HY_V3: Final = GgufFamily(
    "hy_v3",
    NORMS | ATTENTION | QK_NORMS | DENSE | grouped("routed", {
        "ffn_gate_inp.weight": Part("mlp.router.gate.weight"), "exp_probs_b": Part("mlp.expert_bias"), **EXPERTS,
        **separate("mlp.shared_mlp", PROJECTIONS, "_shexp"),
    }),
    WHOLE,
    keys=(
        _EXPERT_WIDTH, ("add_expert_shared_feed_forward_length", shared_width),
        ("add_expert_weights_norm", constant(value=True)), ("add_expert_weights_scale", "router_scaling_factor"),
        _SIGMOID,
    ),
)  # fmt: skip
HUNYUAN_V1_MOE: Final = GgufFamily(
    "hunyuan-moe",
    NORMS | ATTENTION | {
        "attn_q_norm.weight": Part("self_attn.query_layernorm.weight"),
        "attn_k_norm.weight": Part("self_attn.key_layernorm.weight"),
        "ffn_gate_inp.weight": Part("mlp.gate.wg.weight"), **EXPERTS,
        **separate("mlp.shared_mlp", PROJECTIONS, "_shexp"),
    },
    WHOLE,
    keys=(
        ("add_expert_shared_feed_forward_length", "intermediate_size"),
        ("add_expert_feed_forward_length", first_of("moe_intermediate_size")),
        ("add_expert_used_count", first_of("moe_topk")), ("add_expert_shared_count", first_of("num_shared_expert")),
    ),
)  # fmt: skip
GRANITE_MOE_SWA: Final = GgufFamily(
    "granite_swa",
    NORMS | TURNED | {
        "attn_sinks.weight": Part("self_attn.sinks"), "ffn_gate_inp.weight": Part("block_sparse_moe.router.weight"),
        "ffn_gate_up_exps.weight": Part("block_sparse_moe.experts.gate_up_proj"),
        "ffn_down_exps.weight": Part("block_sparse_moe.experts.down_proj"),
        "ffn_up_shexp.weight": optional("shared_mlp.input_linear.weight"),
        "ffn_down_shexp.weight": optional("shared_mlp.output_linear.weight"),
    },
    WHOLE, keys=(*_GRANITE_KEYS, *_WINDOW), replaces=(("head_dim", constant(None)),), is_llama=True,
    refuses=(_HEADS, _WITHOUT_WINDOW, (is_partly_unrotated, "rotates positions in every layer")),
)  # fmt: skip
DEEPSEEK_V3: Final = GgufFamily(
    "deepseek2",
    NORMS | DENSE | ROUTED | CHOICE | SHARED | {
        "attn_q.weight": optional("self_attn.q_proj.weight"), "attn_q_a.weight": optional("self_attn.q_a_proj.weight"),
        "attn_q_a_norm.weight": optional("self_attn.q_a_layernorm.weight"),
        "attn_q_b.weight": optional("self_attn.q_b_proj.weight"),
        "attn_kv_a_mqa.weight": Part("self_attn.kv_a_proj_with_mqa.weight"),
        "attn_kv_a_norm.weight": Part("self_attn.kv_a_layernorm.weight"),
        "attn_k_b.weight": Part("self_attn.kv_b_proj.weight", cut="keys"),
        "attn_v_b.weight": Part("self_attn.kv_b_proj.weight", cut="values"),
        "attn_output.weight": ATTENTION["attn_output.weight"],
    },
    WHOLE,
    keys=(
        _DENSE_PREFIX, _VOCAB_SIZE, ("add_q_lora_rank", "q_lora_rank"), ("add_kv_lora_rank", "kv_lora_rank"),
        ("add_key_length", key_width), ("add_value_length", "kv_lora_rank"), ("add_key_length_mla", key_head_width),
        ("add_value_length_mla", "v_head_dim"), _EXPERT_WIDTH, ("add_expert_shared_count", "n_shared_experts"),
        *_WEIGHTS, ("add_rope_dimension_count", "qk_rope_head_dim"),
        ("add_rope_scaling_yarn_log_mul", yarn_log_factor),
    ),
    replaces=(("num_key_value_heads", constant(1)), ("head_dim", constant(None))), refuses=(_WITHOUT_SHARED,),
    knows=frozenset({MSCALE}),
)  # fmt: skip

GGUF_FAMILIES: Final[Mapping[str, GgufFamily]] = {
    "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "granitemoe": GRANITE_MOE, "granitemoeshared": GRANITE_MOE,
    "granitemoehybrid": GRANITE_HYBRID, "glm4_moe": GLM4_MOE, "solar_open": SOLAR_OPEN, "dots1": DOTS1,
    "ernie4_5_moe": ERNIE4_5_MOE, "lfm2_moe": LFM2_MOE, "cohere2_moe": COHERE2_MOE, "mellum": MELLUM,
    "exaone_moe": EXAONE_MOE, "hy_v3": HY_V3, "hunyuan_v1_moe": HUNYUAN_V1_MOE, "granitemoe_swa": GRANITE_MOE_SWA,
    "deepseek_v3": DEEPSEEK_V3,
}  # fmt: skip
"""By `model_type`."""
