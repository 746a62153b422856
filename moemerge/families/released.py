"""Families that are read: those that a merge can write, and released ones that no merge writes."""

from typing import Final

from moemerge.families.family import COMMON, ROPE, SPARSE, MoeFamily, Shared, separate
from moemerge.families.selection import MOE_FAMILIES

OLMOE: Final = MoeFamily(
    "olmoe",
    "OlmoeForCausalLM",
    experts=separate("mlp.experts.{expert}"),
    router="mlp.gate.weight",
    named=ROPE
    | {
        "intermediate_size": "expert_width",
        "num_experts": "experts",
        "num_experts_per_tok": "experts_per_token",
        "attention_bias": "qkv_bias",
    },
    fixed=SPARSE | {"norm_topk_prob": False, "clip_qkv": None},
    carried=COMMON,
    blocks=(),
    router_defaults={"norm_topk_prob": False},
)
"""OLMoE, in the layout of allenai/OLMoE-1B-7B-0924."""
DEEPSEEK_V2: Final = MoeFamily(
    "deepseek_v2", "DeepseekV2ForCausalLM",
    experts=separate("mlp.experts.{expert}"),
    router="mlp.gate.weight",
    named=ROPE
    | {
        "intermediate_size": "dense_width", "moe_intermediate_size": "expert_width", "n_routed_experts": "experts",
        "num_experts_per_tok": "experts_per_token", "n_shared_experts": "shared_count",
        "first_k_dense_replace": "dense_prefix", "attention_bias": "qkv_bias",
    },
    fixed={"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "mlp_bias": False},
    carried=(*COMMON, "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    blocks=(),
    interleaved=True,
    shared=Shared(separate("mlp.shared_experts"), "multiple", "zeros"),
    dense_layers="prefix",
    # transformers' class has a key norm_topk_prob, and never divides.
    router_defaults={"norm_topk_prob": False},
)  # fmt: skip
"""DeepSeek-V2, in the layout of deepseek-ai/DeepSeek-V2-Lite."""

READABLE: Final = {**MOE_FAMILIES, "olmoe": OLMOE, "deepseek_v2": DEEPSEEK_V2}
"""Families of mixtures that are read, by model type."""
