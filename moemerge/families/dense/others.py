"""Dense families whose layers only their own MoE sibling repeats."""

from typing import Any, Final

from moemerge.families.dense.family import FULL, SLIDING, Config, DenseFamily, LayerTensor
from moemerge.families.dense.llama_like import ATTENTION, DEFAULTS, LAYER

OLMO2: Final = DenseFamily(
    "olmo2",
    (
        *ATTENTION,
        LayerTensor("self_attn.q_norm.weight", ("query",)),
        LayerTensor("self_attn.k_norm.weight", ("key",)),
        LayerTensor("post_attention_layernorm.weight", ("hidden",)),
        LayerTensor("post_feedforward_layernorm.weight", ("hidden",)),
    ),
    DEFAULTS
    | {"rms_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279, "attention_bias": False},
    {"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    block="olmo2",
    ffn_norm=None,
    around_ffn="normalises what its FFNs give, and not what they take",
)
HUNYUAN: Final = DenseFamily(
    "hunyuan_v1_dense",
    (
        *LAYER,
        LayerTensor("self_attn.query_layernorm.weight", ("head",)),
        LayerTensor("self_attn.key_layernorm.weight", ("head",)),
    ),
    DEFAULTS | {"rms_norm_eps": 1e-5, "pad_token_id": 0, "head_dim": None, "attention_bias": False},
    {"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    block="hunyuan",
)


def _window_but_every_fourth(config: Config) -> list[str]:
    every = config["sliding_window_pattern"]
    return [SLIDING if (layer + 1) % every else FULL for layer in range(config["num_hidden_layers"])]


def _rotate_all_layers(config: Config) -> dict[str, Any]:
    # Cohere2 rotates only the layers with a window; Cohere rotates all.
    context = max(config["max_position_embeddings"], config["model_max_length"] or 0)
    return {"layer_types": [SLIDING] * config["num_hidden_layers"], "window": context}


_BESIDE: Final = "has attention and FFNs side by side, behind one LayerNorm"
COHERE2: Final = DenseFamily(
    "cohere2", (LayerTensor("input_layernorm.weight", ("hidden",)), *ATTENTION),
    {key: value for key, value in DEFAULTS.items() if key != "rms_norm_eps"}
    | {
        "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "pad_token_id": 0,
        "bos_token_id": 5, "eos_token_id": 255001, "tie_word_embeddings": True, "attention_bias": False,
        "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None,
    },
    {"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    block="cohere2",
    ffn_norm="input_layernorm.weight",
    around_ffn=_BESIDE,
    interleaved=True,
    layer_types=_window_but_every_fourth,
)  # fmt: skip
_COHERE2_ALONE: Final = ("sliding_window", "sliding_window_pattern", "layer_types")
COHERE: Final = DenseFamily(
    "cohere",
    COHERE2.tensors,
    {key: value for key, value in COHERE2.defaults.items() if key not in _COHERE2_ALONE}
    | {"rope_theta": 500000.0, "use_qk_norm": False, "model_max_length": None},
    COHERE2.facts,
    block="cohere2",
    ffn_norm="input_layernorm.weight",
    around_ffn=_BESIDE,
    interleaved=True,
    values=_rotate_all_layers,
    notes=(("", "cohere2_moe sees no further back than the longest context that config.json names"),),
    refusals={"use_qk_norm": (False, "cohere2_moe does not normalise queries and keys")},
)
YOUTU: Final = DenseFamily(
    "youtu",
    (
        LayerTensor("input_layernorm.weight", ("hidden",)), LayerTensor("post_attention_layernorm.weight", ("hidden",)),
        LayerTensor("self_attn.q_a_proj.weight", ("q_rank", "hidden")),
        LayerTensor("self_attn.q_a_layernorm.weight", ("q_rank",)),
        LayerTensor("self_attn.q_b_proj.weight", ("mla_query", "q_rank")),
        LayerTensor("self_attn.kv_a_proj_with_mqa.weight", ("mla_kv", "hidden")),
        LayerTensor("self_attn.kv_a_layernorm.weight", ("kv_rank",)),
        LayerTensor("self_attn.kv_b_proj.weight", ("mla_keys_values", "kv_rank")),
        LayerTensor("self_attn.o_proj.weight", ("hidden", "mla_values")),
    ),
    DEFAULTS
    | {
        "max_position_embeddings": 131072, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "bos_token_id": 128000,
        "eos_token_id": 128001, "tie_word_embeddings": True, "rope_interleave": True, "attention_bias": False,
        "initializer_range": None,
    },
    block="mla",
    interleaved=True,
    head_dim="qk_rope_head_dim",
    sizes=lambda config: {
        "q_rank": config["q_lora_rank"], "kv_rank": config["kv_lora_rank"],
        "mla_query": config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]),
        "mla_kv": config["kv_lora_rank"] + config["qk_rope_head_dim"],
        "mla_keys_values": config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["v_head_dim"]),
        "mla_values": config["num_attention_heads"] * config["v_head_dim"],
    },
    refusals={"attention_bias": (False, "DeepSeek's latent attention was proved without biases only")},
)  # fmt: skip
