"""Dense families that compute like Llama but for a few facts: the ones that people merge most."""

from dataclasses import replace
from typing import Any, Final

from moemerge.families.dense.family import FULL, SLIDING, Config, DenseFamily, FfnProjection, LayerTensor, Role

ATTENTION: Final = (
    LayerTensor("self_attn.q_proj.weight", ("query", "hidden")),
    LayerTensor("self_attn.q_proj.bias", ("query",), ("qkv_bias",)),
    LayerTensor("self_attn.k_proj.weight", ("key", "hidden")),
    LayerTensor("self_attn.k_proj.bias", ("key",), ("qkv_bias",)),
    LayerTensor("self_attn.v_proj.weight", ("key", "hidden")),
    LayerTensor("self_attn.v_proj.bias", ("key",), ("qkv_bias",)),
    LayerTensor("self_attn.o_proj.weight", ("hidden", "query")),
    LayerTensor("self_attn.o_proj.bias", ("hidden",), ("output_bias",)),
)
QK_NORM: Final = (LayerTensor("self_attn.q_norm.weight", ("head",)), LayerTensor("self_attn.k_norm.weight", ("head",)))
FUSED_FFN: Final[dict[Role, FfnProjection]] = {
    "gate": FfnProjection("mlp.gate_up_proj.weight", 0, 2),
    "up": FfnProjection("mlp.gate_up_proj.weight", 1, 2),
    "down": FfnProjection("mlp.down_proj.weight"),
}
_FIRST_NORM: Final = LayerTensor("input_layernorm.weight", ("hidden",))
_SECOND_NORM: Final = LayerTensor("post_attention_layernorm.weight", ("hidden",))
LAYER: Final = (_FIRST_NORM, *ATTENTION, _SECOND_NORM)
DEFAULTS: Final[dict[str, Any]] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "rope_theta": 10000.0, "attention_dropout": 0.0,
    "max_position_embeddings": 2048, "num_key_value_heads": None,
}  # fmt: skip
_ATTENTION_BIAS: Final[dict[str, str | bool]] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_NO_BIAS: Final = {"attention_bias": False, "mlp_bias": False}


def windows_everywhere(config: Config) -> list[str]:
    """Give every layer the window, if there is one."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return [kind] * int(config["num_hidden_layers"])


def windows_above(config: Config) -> list[str]:
    """Apply Qwen's rule: layers from `max_window_layers` on have the window, where it is switched on."""
    has_window = config["use_sliding_window"] and config.get("sliding_window") is not None
    return [
        SLIDING if has_window and layer >= config["max_window_layers"] else FULL
        for layer in range(config["num_hidden_layers"])
    ]


def full_every_fourth(config: Config) -> list[str]:
    """Let layers 0, 4, 8 and so on attend to everything."""
    return [SLIDING if layer % 4 else FULL for layer in range(config["num_hidden_layers"])]


def _without_query_scale(config: Config) -> dict[str, Any]:
    unknown = ("llama_4_scaling_beta", "max_position_embeddings")
    scaling = {key: value for key, value in (config["rope_scaling"] or {}).items() if key not in unknown} or None
    return {"rope_scaling": scaling}


LLAMA: Final = DenseFamily("llama", LAYER, DEFAULTS | _NO_BIAS, _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"})
MISTRAL: Final = DenseFamily(
    "mistral",
    LAYER,
    DEFAULTS
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None},
    layer_types=windows_everywhere,
)
MINISTRAL: Final = replace(MISTRAL, model_type="ministral")
MINISTRAL3: Final = DenseFamily(
    "ministral3", LAYER,
    DEFAULTS
    | {
        "max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "pad_token_id": 11, "sliding_window": None, "rope_theta": 1e6,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
    layer_types=windows_everywhere,
    values=_without_query_scale,
    notes=(
        (
            "",
            "ministral3 scales queries beyond original_max_position_embeddings, which no output family does: "
            "the merge is exact only up to there",
        ),
    ),
)  # fmt: skip
CWM: Final = DenseFamily(
    "cwm", LAYER,
    DEFAULTS
    | {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "sliding_window": 8192, "mlp_bias": False,
        "layer_types": None,
        "rope_theta": 1e6,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    {"mlp_bias": "mlp_bias"},
    layer_types=full_every_fourth,
)  # fmt: skip
PHI3: Final = DenseFamily(
    "phi3",
    (
        _FIRST_NORM, LayerTensor("self_attn.qkv_proj.weight", ("qkv", "hidden")),
        LayerTensor("self_attn.o_proj.weight", ("hidden", "query")), _SECOND_NORM,
    ),
    DEFAULTS
    | {
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000, "pad_token_id": 32000,
        "original_max_position_embeddings": 4096, "sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "partial_rotary_factor": 1.0,
    },
    ffn=FUSED_FFN,
    splits={
        "self_attn.qkv_proj.weight": {
            "self_attn.q_proj.weight": "query", "self_attn.k_proj.weight": "key", "self_attn.v_proj.weight": "key",
        }
    },
    layer_types=windows_everywhere,
    rope_kinds={"su": "longrope", "yarn": "longrope"},
    notes=(
        (
            "longrope",
            "transformers' phi3 computes its cache anew when generation crosses position {original}, where longrope's "
            "factors change; {family} does not, and from there on says something else than phi3 would. Texts that stay "
            "below, or that begin beyond, are not concerned",
        ),
    ),
)  # fmt: skip
QWEN2: Final = DenseFamily(
    "qwen2", LAYER,
    DEFAULTS
    | {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
    },
    {"qkv_bias": True},
    layer_types=windows_above,
)  # fmt: skip
SEED_OSS: Final = DenseFamily(
    "seed_oss", LAYER,
    DEFAULTS
    | {
        "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128, "pad_token_id": 1,
        "bos_token_id": 0, "attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1,
        "residual_dropout": 0.1, "mlp_bias": False,
    },
    {"qkv_bias": "attention_bias", "output_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
)  # fmt: skip
QWEN3: Final = DenseFamily(
    "qwen3", (*LAYER, *QK_NORM),
    DEFAULTS
    | {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, "bos_token_id": None,
        "eos_token_id": None, "attention_bias": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "layer_types": None,
    },
    _ATTENTION_BIAS | {"qk_norm": True},
    layer_types=windows_above,
)  # fmt: skip
HELIUM: Final = DenseFamily(
    "helium",
    LAYER,
    DEFAULTS
    | _NO_BIAS
    | {
        "max_position_embeddings": 4096,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
        "pad_token_id": 3,
    },
    {"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    interleaved=True,
)
ERNIE4_5: Final = DenseFamily(
    "ernie4_5", LAYER,
    DEFAULTS
    | {
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "pad_token_id": 0, "tie_word_embeddings": True, "use_bias": False,
    },
    {"qkv_bias": "use_bias", "output_bias": "use_bias", "mlp_bias": "use_bias"},
    interleaved=True,
)  # fmt: skip
GRANITE: Final = DenseFamily(
    "granite",
    LAYER,
    DEFAULTS
    | _NO_BIAS
    | {
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
)
HYPERCLOVAX: Final = DenseFamily(
    "hyperclovax",
    LAYER,
    GRANITE.defaults | {"attention_multiplier": None, "use_post_norm": True},
    GRANITE.facts,
    # Its factor multiplies logits, Granite's divides them.
    values=lambda config: {"logits_scaling": 1 / config["logits_scaling"]},
    refusals={"use_post_norm": (False, "no output family has a norm after each half of a layer like that")},
)


def _theta_by_layer(config: Config) -> dict[str, Any]:
    given = config.get("layer_rope_theta")
    return {"layer_rope_theta": given or [config["rope_theta"]] * config["num_hidden_layers"]}


def _theta_of_rotating_layers(config: Config) -> dict[str, Any]:
    return {"layer_rope_theta": [config["rope_theta"] if rotates else 0 for rotates in _rotating(config)]}


def _windows_without_positions(config: Config) -> list[str]:
    has_window = config["use_sliding_window"] and config.get("sliding_window") is not None
    return [SLIDING if has_window and not rotates else FULL for rotates in _rotating(config)]


def _rotating(config: Config) -> list[int]:
    """Read SmolLM3's `no_rope_layers`, in which 1 means that a layer does rotate."""
    layers, every = config["num_hidden_layers"], config["no_rope_layer_interval"]
    return config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]


GRANITE_SWA: Final = DenseFamily(
    "granite_swa", (*LAYER, LayerTensor("self_attn.sinks", ("heads",))),
    GRANITE.defaults
    | {
        "max_position_embeddings": 8192, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "bos_token_id": 100257,
        "eos_token_id": 100257, "tie_word_embeddings": True, "sliding_window": 128, "layer_rope_theta": None,
        "layer_types": None,
    },
    GRANITE.facts | {"sinks": True},
    layer_types=full_every_fourth,
    values=_theta_by_layer,
)  # fmt: skip
SMOLLM3: Final = DenseFamily(
    "smollm3", LAYER,
    DEFAULTS
    | _NO_BIAS
    | {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2000000.0, "pad_token_id": 128004,
        "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": True, "use_sliding_window": False,
        "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None,
    },
    _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
    layer_types=_windows_without_positions,
    values=_theta_of_rotating_layers,
)  # fmt: skip
