"""Families that repeat one dense sibling alone, as GGUF families: ERNIE 4.5, LFM2, Cohere2, Hunyuan, Gemma 4."""

from typing import Final

from moemerge.export.families import GgufFamily, Part, grouped, optional, separate
from moemerge.export.key_values import (
    constant,
    dense_lead,
    ends_dense,
    first_of,
    has_layer_inputs,
    has_shared,
    heads_by_layer,
    is_not_proportional,
    key_heads_of_kinds,
    truthy,
    whole_layers,
)
from moemerge.export.shared_tables import (
    ATTENTION,
    DENSE,
    EXPERT_WIDTH,
    EXPERTS,
    LATE_DENSE,
    NORMS,
    OPTIONAL_QK_NORMS,
    PROJECTIONS,
    ROTATED,
    ROUTED,
    SIGMOID,
    VOCAB_SIZE,
    WHOLE,
    WINDOW,
)

ERNIE4_5_MOE: Final = GgufFamily(
    "ernie4_5-moe",
    NORMS
    | ATTENTION
    | DENSE
    | ROUTED
    | grouped("routed", {"exp_probs_b.bias": Part("mlp.moe_statics.e_score_correction_bias")}),
    WHOLE,
    keys=(
        ("add_expert_count", "moe_num_experts"),
        ("add_expert_used_count", "moe_k"),
        ("add_interleave_moe_layer_step", "moe_layer_interval"),
        ("add_leading_dense_block_count", "moe_layer_start_index"),
        EXPERT_WIDTH,
        ("add_expert_shared_count", "moe_num_shared_experts"),
    ),
    is_llama=True,
    refuses=(
        (has_shared, "does not load it with a shared expert"),
        (ends_dense, "does not load it with dense layers after others"),
    ),
)
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
        EXPERT_WIDTH, ("add_leading_dense_block_count", "num_dense_layers"), SIGMOID, VOCAB_SIZE,
        ("add_shortconv_l_cache", "conv_L_cache"),
    ),
    replaces=(("num_key_value_heads", heads_by_layer),),
)  # fmt: skip
COHERE2_MOE: Final = GgufFamily(
    "cohere2moe",
    {"attn_norm.weight": NORMS["attn_norm.weight"], **ATTENTION, **DENSE, **ROUTED},
    WHOLE,
    keys=(
        ("add_logit_scale", "logit_scale"),
        *WINDOW,
        VOCAB_SIZE,
        ("add_expert_feed_forward_length", "intermediate_size"),
        ("add_leading_dense_block_count", dense_lead),
        ("add_expert_weights_norm", "norm_topk_prob"),
        ROTATED,
        ("add_rope_scaling_type", constant("NONE")),
    ),
    refuses=(LATE_DENSE,),
)
HUNYUAN_V1_MOE: Final = GgufFamily(
    "hunyuan-moe",
    NORMS
    | ATTENTION
    | {
        "attn_q_norm.weight": Part("self_attn.query_layernorm.weight"),
        "attn_k_norm.weight": Part("self_attn.key_layernorm.weight"),
        "ffn_gate_inp.weight": Part("mlp.gate.wg.weight"),
        **EXPERTS,
        **separate("mlp.shared_mlp", PROJECTIONS, "_shexp"),
    },
    WHOLE,
    keys=(
        ("add_expert_shared_feed_forward_length", "intermediate_size"),
        ("add_expert_feed_forward_length", first_of("moe_intermediate_size")),
        ("add_expert_used_count", first_of("moe_topk")),
        ("add_expert_shared_count", first_of("num_shared_expert")),
    ),
)
_WHOLE_HEAD: Final = whole_layers("head_dim", "global_head_dim")
GEMMA4: Final = GgufFamily(
    "gemma4",
    NORMS | ATTENTION | OPTIONAL_QK_NORMS | {
        "attn_v.weight": optional("self_attn.v_proj.weight"),
        "post_attention_norm.weight": Part("post_attention_layernorm.weight"),
        "ffn_norm.weight": Part("pre_feedforward_layernorm.weight"),
        "pre_ffw_norm_2.weight": Part("pre_feedforward_layernorm_2.weight"),
        "post_ffw_norm.weight": Part("post_feedforward_layernorm.weight"),
        "post_ffw_norm_1.weight": Part("post_feedforward_layernorm_1.weight"),
        "post_ffw_norm_2.weight": Part("post_feedforward_layernorm_2.weight"),
        "layer_output_scale.weight": Part("layer_scalar"), **separate("mlp", PROJECTIONS),
        "ffn_gate_inp.weight": Part("router.proj.weight"), "ffn_gate_inp.scale": Part("router.scale"),
        "ffn_gate_up_exps.weight": Part("experts.gate_up_proj"), "ffn_down_exps.weight": Part("experts.down_proj"),
        "ffn_down_exps.scale": Part("router.per_expert_scale"),
    },
    WHOLE,
    keys=(
        ("add_final_logit_softcapping", truthy("final_logit_softcapping")), *WINDOW,
        ("add_shared_kv_layers", "num_kv_shared_layers"), ("add_embedding_length_per_layer_input", constant(0)),
        ("add_key_length", _WHOLE_HEAD), ("add_value_length", _WHOLE_HEAD), ("add_key_length_swa", "head_dim"),
        ("add_value_length_swa", "head_dim"), EXPERT_WIDTH, ("add_head_count_kv", key_heads_of_kinds),
        ("add_rope_dimension_count", _WHOLE_HEAD), ("add_rope_dimension_count_swa", "head_dim"),
    ),
    is_gemma4=True,
    refuses=(
        (is_not_proportional, "turns layers without a window proportionally"),
        (has_layer_inputs, "was not tried with embeddings for each layer, nor with keys that layers share"),
    ),
)  # fmt: skip
