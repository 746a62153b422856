"""Every dense family that can be merged, and those that cannot, with the reason."""

from typing import Final

from moemerge.families.dense.gemma4 import GEMMA4
from moemerge.families.dense.hybrids import GRANITE_HYBRID, LFM2, QWEN3_5
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
from moemerge.families.dense.relatives import GEMMA, GLM

DENSE_FAMILIES: Final = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, CWM, PHI3, QWEN2, QWEN3, QWEN3_5, SEED_OSS, SMOLLM3, GRANITE,
        GRANITE_SWA, GRANITE_HYBRID, HYPERCLOVAX, OLMO2, ERNIE4_5, HELIUM, HUNYUAN, COHERE, COHERE2, LFM2, GEMMA4,
        YOUTU, GLM, GEMMA,
    )
}  # fmt: skip

_NOT_GATED: Final = "its FFN has no gate"
_NO_SIBLING: Final = "it has no MoE sibling"
_SOFTCAPPED: Final = "it caps attention scores, which no output family does"
NOT_MERGED: Final = {
    **dict.fromkeys(
        (
            "apertus", "arcee", "biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
            "gptj", "jais2", "mpt", "nanochat", "nemotron", "opt", "persimmon", "phi", "starcoder2", "xglm",
        ),
        _NOT_GATED,
    ),
    **dict.fromkeys(
        ("doge", "gemma3n_text", "hrm_text", "lfm3", "olmo_hybrid", "recurrent_gemma", "zamba", "zamba2", "falcon_h1",
            "modernbert-decoder",
        ),
        _NO_SIBLING,
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "it has no FFN"),
    "bamba": "it rotates half of each head, granitemoehybrid all of it",
    "bitnet": "it normalises inside attention and FFN",
    "diffllama": "it subtracts attentions from each other",
    "gemma2": _SOFTCAPPED,
    "vaultgemma": _SOFTCAPPED,
    "gemma3_text": "gemma4 normalises values, gemma3 does not",
    "gemma3": "gemma4 normalises values, gemma3 does not",
    "stablelm": "it normalises by LayerNorm; phimoe does too, and does not divide weights by their sum",
    "orion": "it normalises by LayerNorm, and has no MoE sibling",
    "olmo": "olmoe normalises queries and keys, and has weights in its norms",
    "olmo3": "flex_olmo has no sliding windows: equal only up to the window's length",
    "glm4": "glm4_moe has no norms after attention and FFN, and rotates halves of heads",
    "exaone4": "exaone_moe normalises before attention and FFN, exaone4 after them",
    "minicpm3": "its scales of embeddings and depth have no place in deepseek_v3",
    "llama4_text": "its router scales what the expert sees",
}  # fmt: skip
"""Model types that only look as if they could be merged, with reasons; measured or read in `transformers` 5.23."""
