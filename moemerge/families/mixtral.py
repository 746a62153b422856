"""Mixtral, in the layout of mistralai/Mixtral-8x7B-v0.1: read by transformers 4 and 5, vLLM, llama.cpp and mlx-lm.

transformers 5 names the tensors differently in memory; written that way, transformers 4 loads random experts with no
more than a warning.
"""

from typing import Final

from moemerge.families.family import COMMON, ROPE, SPARSE, MoeFamily, separate

MIXTRAL: Final = MoeFamily(
    "mixtral",
    "MixtralForCausalLM",
    experts=separate("block_sparse_moe.experts.{expert}", ("w1", "w3", "w2")),
    router="block_sparse_moe.gate.weight",
    named=ROPE
    | {
        "intermediate_size": "expert_width",
        "num_local_experts": "experts",
        "num_experts_per_tok": "experts_per_token",
        "sliding_window": "window",
    },
    fixed=SPARSE | {"router_jitter_noise": 0.0},
    carried=COMMON,
    holds=frozenset({"window", "wide_heads", "scaled_rope"}),
    appends_shared=True,
)
