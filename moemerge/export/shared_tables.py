"""Tables that families share: names of a GGUF file's tensors and their sources, keys, reasons."""

from typing import Final

from moemerge.export.families import Names, Part, grouped, optional, separate
from moemerge.export.key_values import (
    constant,
    has_late_dense,
    has_no_shared,
    has_no_window,
    has_window,
    head_width,
    is_sliding,
)

TIED: Final[Names] = {
    "token_embd.weight": Part("model.embed_tokens.weight"),
    "output_norm.weight": Part("model.norm.weight"),
}
WHOLE: Final[Names] = TIED | {"output.weight": optional("lm_head.weight")}
UNTIED: Final[Names] = TIED | {"output.weight": Part("lm_head.weight")}
NORMS: Final[Names] = {
    "attn_norm.weight": Part("input_layernorm.weight"),
    "ffn_norm.weight": Part("post_attention_layernorm.weight"),
}
ATTENTION: Final[Names] = {
    f"attn_{name}.weight": Part(f"self_attn.{source}_proj.weight")
    for name, source in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
}
BIASES: Final[Names] = {
    f"attn_{name}.bias": optional(f"self_attn.{source}_proj.bias")
    for name, source in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
}
TURNED: Final[Names] = (
    ATTENTION
    | BIASES
    | {
        "attn_q.weight": Part("self_attn.q_proj.weight", "query"),
        "attn_q.bias": Part("self_attn.q_proj.bias", "query", needed=False),
        "attn_k.weight": Part("self_attn.k_proj.weight", "key"),
        "attn_k.bias": Part("self_attn.k_proj.bias", "key", needed=False),
    }
)
QK_NORMS: Final[Names] = {
    "attn_q_norm.weight": Part("self_attn.q_norm.weight"),
    "attn_k_norm.weight": Part("self_attn.k_norm.weight"),
}
OPTIONAL_QK_NORMS: Final[Names] = {
    "attn_q_norm.weight": optional("self_attn.q_norm.weight"),
    "attn_k_norm.weight": optional("self_attn.k_norm.weight"),
}
PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
DENSE: Final = grouped("dense", separate("mlp", PROJECTIONS))
EXPERTS: Final = separate("mlp.experts.{expert}", PROJECTIONS, "_exps")
ROUTED: Final = grouped("routed", {"ffn_gate_inp.weight": Part("mlp.gate.weight"), **EXPERTS})
SHARED: Final = grouped("routed", separate("mlp.shared_experts", PROJECTIONS, "_shexp"))
CHOICE: Final = grouped("routed", {"exp_probs_b.bias": Part("mlp.gate.e_score_correction_bias")})

EXPERT_WIDTH: Final = ("add_expert_feed_forward_length", "moe_intermediate_size")
VOCAB_SIZE: Final = ("add_vocab_size", "vocab_size")
WINDOW: Final = (("add_sliding_window", "sliding_window"), ("add_sliding_window_pattern", is_sliding))
DENSE_PREFIX: Final = ("add_leading_dense_block_count", "first_k_dense_replace")
ROTATED: Final = ("add_rope_dimension_count", head_width)
WEIGHTS: Final = (
    ("add_expert_weights_scale", "routed_scaling_factor"),
    ("add_expert_weights_norm", "norm_topk_prob"),
)
SIGMOID: Final = ("add_expert_gating_func", constant("SIGMOID"))
WITHOUT_SHARED: Final = (has_no_shared, "does not load it without a shared expert")
WITHOUT_WINDOW: Final = (has_no_window, "does not load it where no layer has a window")
WINDOW_IGNORED: Final = (
    has_window,
    "llama.cpp ignores its window: it is right for texts up to {sliding_window} tokens",
)
LATE_DENSE: Final = (has_late_dense, "does not load it with dense layers after others")
