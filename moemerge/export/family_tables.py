"""The output families that are written as GGUF files, as data."""

from collections.abc import Mapping
from typing import Final

from moemerge.export.families import GgufFamily, Part, grouped, optional, separate
from moemerge.export.key_values import (
    LLAMA3,
    MSCALE,
    constant,
    has_grouped_heads,
    has_states,
    has_wide_heads,
    has_yarn,
    heads_by_layer,
    is_partly_unrotated,
    key_head_width,
    key_width,
    rotated_width,
    shared_width,
    state_width,
    truthy,
    yarn_log_factor,
)
from moemerge.export.shared_tables import (
    ATTENTION,
    BIASES,
    CHOICE,
    DENSE,
    DENSE_PREFIX,
    EXPERT_WIDTH,
    EXPERTS,
    LATE_DENSE,
    NORMS,
    OPTIONAL_QK_NORMS,
    PROJECTIONS,
    QK_NORMS,
    ROTATED,
    ROUTED,
    SHARED,
    SIGMOID,
    TURNED,
    UNTIED,
    VOCAB_SIZE,
    WEIGHTS,
    WHOLE,
    WINDOW,
    WINDOW_IGNORED,
    WITHOUT_SHARED,
    WITHOUT_WINDOW,
)
from moemerge.export.sibling_tables import COHERE2_MOE, ERNIE4_5_MOE, GEMMA4, HUNYUAN_V1_MOE, LFM2_MOE

MIXTRAL: Final = GgufFamily(
    "llama",
    NORMS
    | TURNED
    | {
        "ffn_gate_inp.weight": Part("block_sparse_moe.gate.weight"),
        **separate("block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), "_exps"),
    },
    WHOLE,
    keys=(VOCAB_SIZE, ROTATED),
    knows=frozenset({LLAMA3}),
    is_llama=True,
    notes=(WINDOW_IGNORED,),
)
_GRANITE_KEYS: Final = (
    VOCAB_SIZE,
    ROTATED,
    ("add_attention_scale", truthy("attention_multiplier")),
    ("add_embedding_scale", truthy("embedding_multiplier")),
    ("add_residual_scale", truthy("residual_multiplier")),
    ("add_logit_scale", truthy("logits_scaling")),
    ("add_expert_shared_feed_forward_length", truthy("shared_intermediate_size")),
)
_HEADS: Final = (has_wide_heads, "takes head_dim for hidden_size / num_attention_heads")
GRANITE_MOE: Final = GgufFamily(
    "granitemoe",
    NORMS
    | TURNED
    | {
        "ffn_gate_inp.weight": Part("block_sparse_moe.router.layer.weight"),
        "ffn_gate_exps.weight": Part("block_sparse_moe.input_linear.weight", half="first"),
        "ffn_up_exps.weight": Part("block_sparse_moe.input_linear.weight", half="second"),
        "ffn_down_exps.weight": Part("block_sparse_moe.output_linear.weight"),
        "ffn_gate_shexp.weight": Part("shared_mlp.input_linear.weight", half="first", needed=False),
        "ffn_up_shexp.weight": Part("shared_mlp.input_linear.weight", half="second", needed=False),
        "ffn_down_shexp.weight": optional("shared_mlp.output_linear.weight"),
    },
    WHOLE,
    keys=_GRANITE_KEYS,
    replaces=(("head_dim", constant(None)),),
    is_llama=True,
    refuses=(_HEADS,),
)
# A model that attends in every layer is a granitemoe; it has the settings of layers with states all the same.
GRANITE_HYBRID: Final = GgufFamily(
    "granitemoe",
    GRANITE_MOE.layer,
    WHOLE,
    keys=(
        *_GRANITE_KEYS,
        ("add_ssm_conv_kernel", "mamba_d_conv"),
        ("add_ssm_state_size", "mamba_d_state"),
        ("add_ssm_group_count", "mamba_n_groups"),
        ("add_ssm_inner_size", state_width),
        ("add_ssm_time_step_rank", "mamba_n_heads"),
        ("add_rope_scaling_finetuned", constant(value=True)),
    ),
    replaces=(("head_dim", constant(None)), ("num_key_value_heads", heads_by_layer)),
    refuses=(_HEADS, (has_states, "has files of another kind for state-space layers")),
)
QWEN3_MOE: Final = GgufFamily(
    "qwen3moe",
    NORMS | ATTENTION | QK_NORMS | ROUTED,
    WHOLE,
    keys=(EXPERT_WIDTH,),
)
_GLM_KEYS: Final = (
    ("add_rope_dimension_count", rotated_width),
    EXPERT_WIDTH,
    ("add_expert_shared_count", "n_shared_experts"),
    DENSE_PREFIX,
    SIGMOID,
    *WEIGHTS,
    ("add_nextn_predict_layers", "num_nextn_predict_layers"),
)
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
    refuses=(WITHOUT_SHARED,),
)  # fmt: skip
SOLAR_OPEN: Final = GgufFamily(
    "glm4moe",
    GLM4_MOE.layer,
    WHOLE,
    keys=_GLM_KEYS,
    named_tokens=(
        ("eos", "<|endoftext|>"),
        ("eot", "<|endoftext|>"),
        ("unk", "<unk>"),
        ("bos", "<|startoftext|>"),
    ),
    refuses=(WITHOUT_SHARED,),
)
DOTS1: Final = GgufFamily(
    "dots1",
    NORMS | ATTENTION | QK_NORMS | DENSE | ROUTED | CHOICE | SHARED,
    UNTIED,
    keys=(EXPERT_WIDTH, DENSE_PREFIX, ("add_expert_shared_count", "n_shared_experts"), *WEIGHTS),
    refuses=(WITHOUT_SHARED, (has_grouped_heads, "does not load it with fewer key heads than query heads")),
    notes=(WINDOW_IGNORED,),
)
MELLUM: Final = GgufFamily(
    "mellum",
    NORMS | ATTENTION | QK_NORMS | ROUTED,
    UNTIED,
    keys=(EXPERT_WIDTH, *WINDOW),
    refuses=(
        WITHOUT_WINDOW,
        (has_yarn, "computes something else where rotary positions are scaled by yarn"),
    ),
)
EXAONE_MOE: Final = GgufFamily(
    "exaone-moe",
    NORMS | ATTENTION | QK_NORMS | DENSE | ROUTED | SHARED
    | grouped("routed", {"exp_probs_b.bias": Part("mlp.e_score_correction_bias")}),
    UNTIED,
    keys=(
        VOCAB_SIZE, *WINDOW, EXPERT_WIDTH, ("add_expert_shared_count", "num_shared_experts"),
        ("add_expert_shared_feed_forward_length", shared_width), *WEIGHTS, DENSE_PREFIX,
        ("add_nextn_predict_layers", constant(0)), ("add_rope_scaling_type", constant("NONE")),
    ),
    knows=frozenset({LLAMA3}), refuses=(WITHOUT_SHARED, LATE_DENSE),
)  # fmt: skip
HY_V3: Final = GgufFamily(
    "hy_v3",
    NORMS | ATTENTION | QK_NORMS | DENSE | grouped("routed", {
        "ffn_gate_inp.weight": Part("mlp.router.gate.weight"), "exp_probs_b": Part("mlp.expert_bias"), **EXPERTS,
        **separate("mlp.shared_mlp", PROJECTIONS, "_shexp"),
    }),
    WHOLE,
    keys=(
        EXPERT_WIDTH, ("add_expert_shared_feed_forward_length", shared_width),
        ("add_expert_weights_norm", constant(value=True)), ("add_expert_weights_scale", "router_scaling_factor"),
        SIGMOID,
    ),
)  # fmt: skip
GRANITE_MOE_SWA: Final = GgufFamily(
    "granite_swa",
    NORMS
    | TURNED
    | {
        "attn_sinks.weight": Part("self_attn.sinks"),
        "ffn_gate_inp.weight": Part("block_sparse_moe.router.weight"),
        "ffn_gate_up_exps.weight": Part("block_sparse_moe.experts.gate_up_proj"),
        "ffn_down_exps.weight": Part("block_sparse_moe.experts.down_proj"),
        "ffn_up_shexp.weight": optional("shared_mlp.input_linear.weight"),
        "ffn_down_shexp.weight": optional("shared_mlp.output_linear.weight"),
    },
    WHOLE,
    keys=(*_GRANITE_KEYS, *WINDOW),
    replaces=(("head_dim", constant(None)),),
    is_llama=True,
    refuses=(_HEADS, WITHOUT_WINDOW, (is_partly_unrotated, "rotates positions in every layer")),
)
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
        DENSE_PREFIX, VOCAB_SIZE, ("add_q_lora_rank", "q_lora_rank"), ("add_kv_lora_rank", "kv_lora_rank"),
        ("add_key_length", key_width), ("add_value_length", "kv_lora_rank"), ("add_key_length_mla", key_head_width),
        ("add_value_length_mla", "v_head_dim"), EXPERT_WIDTH, ("add_expert_shared_count", "n_shared_experts"),
        *WEIGHTS, ("add_rope_dimension_count", "qk_rope_head_dim"),
        ("add_rope_scaling_yarn_log_mul", yarn_log_factor),
    ),
    replaces=(("num_key_value_heads", constant(1)), ("head_dim", constant(None))), refuses=(WITHOUT_SHARED,),
    knows=frozenset({MSCALE}),
)  # fmt: skip

GGUF_FAMILIES: Final[Mapping[str, GgufFamily]] = {
    "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "granitemoe": GRANITE_MOE, "granitemoeshared": GRANITE_MOE,
    "granitemoehybrid": GRANITE_HYBRID, "glm4_moe": GLM4_MOE, "solar_open": SOLAR_OPEN, "dots1": DOTS1,
    "ernie4_5_moe": ERNIE4_5_MOE, "lfm2_moe": LFM2_MOE, "cohere2_moe": COHERE2_MOE, "mellum": MELLUM,
    "exaone_moe": EXAONE_MOE, "hy_v3": HY_V3, "hunyuan_v1_moe": HUNYUAN_V1_MOE, "granitemoe_swa": GRANITE_MOE_SWA,
    "deepseek_v3": DEEPSEEK_V3,
    "gemma4_text": GEMMA4,
}  # fmt: skip
"""GGUF families by `model_type`."""
