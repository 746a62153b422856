"""Every dense family that can be merged, and those that cannot, with the reason."""

from typing import Final

from moemerge.families.dense.hybrids import GEMMA4, GRANITE_HYBRID, LFM2, QWEN3_5
from moemerge.families.dense.llama_like import (
    CWM,
    ERNIE4_5,
    GRANITE,
    GRANITE_SWA,
    HELIUM,
    HYPERCLOVAX,
    LLAMA,
    MINISTRAL,
    MINISTRAL3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SEED_OSS,
    SMOLLM3,
)
from moemerge.families.dense.others import COHERE, COHERE2, HUNYUAN, OLMO2, YOUTU

DENSE_FAMILIES: Final = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, CWM, PHI3, QWEN2, QWEN3, QWEN3_5, SEED_OSS, SMOLLM3, GRANITE,
        GRANITE_SWA, GRANITE_HYBRID, HYPERCLOVAX, OLMO2, ERNIE4_5, HELIUM, HUNYUAN, COHERE, COHERE2, LFM2, GEMMA4,
        YOUTU,
    )
}  # fmt: skip

_NOT_GATED: Final = "its FFN has no gate, or it normalises by LayerNorm, and there is no MoE sibling"
NOT_MERGED: Final = {
    "gemma": "it has no MoE sibling",
    "gemma2": "it has no MoE sibling",
    "gemma3_text": "gemma4 normalises values, gemma3 does not",
    "gemma3": "gemma4 normalises values, gemma3 does not",
    "gemma3n_text": "it has no MoE sibling",
    **dict.fromkeys(
        ("starcoder2", "phi", "nemotron", "arcee", "apertus", "jais2", "gpt_neox", "falcon", "stablelm", "orion"),
        _NOT_GATED,
    ),
    "olmo": "olmoe normalises queries and keys, and has weights in its norms",
    "olmo3": "flex_olmo has no sliding windows: equal only up to the window's length",
    "glm4": "glm4_moe has no norms after attention and FFN, and rotates halves of heads",
    "exaone4": "exaone_moe normalises before attention and FFN, exaone4 after them",
    "minicpm3": "its scales of embeddings and depth have no place in deepseek_v3",
    "llama4_text": "its router scales what the expert sees",
}
"""Model types that only look as if they could be merged, with reasons; measured or read in `transformers` 5.23."""
