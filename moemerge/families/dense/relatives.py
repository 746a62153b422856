"""Dense families that compute like Llama once rows are regrouped, or norms shifted and embeddings scaled."""

import math
from typing import Any, Final

from moemerge.families.dense.family import Config, DenseFamily
from moemerge.families.dense.llama_like import DEFAULTS, FUSED_FFN, LAYER

_BIAS: Final[dict[str, str | bool]] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}

GLM: Final = DenseFamily(
    "glm", LAYER,
    DEFAULTS
    | {
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
        "pad_token_id": 151329, "bos_token_id": None, "eos_token_id": [151329, 151336, 151338], "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    {"qkv_bias": "attention_bias"},
    ffn=FUSED_FFN,
    interleaved=True,
)  # fmt: skip


def _gemma_scale(config: Config) -> dict[str, Any]:
    return {"embedding_multiplier": math.sqrt(config["hidden_size"])}


GEMMA: Final = DenseFamily(
    "gemma", LAYER,
    DEFAULTS
    | {
        "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True, "attention_bias": False,
        "use_bidirectional_attention": False,
    },
    _BIAS,
    activations={"gelu": "gelu_pytorch_tanh"},
    norm_offset=1.0,
    values=_gemma_scale,
    refusals={"use_bidirectional_attention": (False, "only causal attention was proved")},
)  # fmt: skip
