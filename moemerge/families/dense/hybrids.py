"""Dense families with several kinds of layers: convolutions, linear attention, state spaces beside attention."""

from typing import Any, Final

from moemerge.families.dense.family import FULL, Config, DenseFamily, FfnProjection, LayerTensor, Role
from moemerge.families.dense.llama_like import ATTENTION, DEFAULTS, GRANITE, QK_NORM


def _lfm2_width(config: Config) -> int:
    width = int(config["intermediate_size"])
    if not config["block_auto_adjust_ff_dim"]:
        return width
    width = int(2 * width / 3)
    if config["block_ffn_dim_multiplier"] is None:
        return width
    unit = config["block_multiple_of"]
    return int(unit * -(-int(config["block_ffn_dim_multiplier"] * width) // unit))


def _lfm2_layers(config: Config) -> list[str]:
    given = config.get("full_attn_idxs")
    layers = range(config["num_hidden_layers"])
    return [FULL if given is None or layer in given else "conv" for layer in layers]


_LFM2_FFN: Final[dict[Role, FfnProjection]] = {
    "gate": FfnProjection("feed_forward.w1.weight"),
    "up": FfnProjection("feed_forward.w3.weight"),
    "down": FfnProjection("feed_forward.w2.weight"),
}
LFM2: Final = DenseFamily(
    "lfm2",
    (
        LayerTensor("operator_norm.weight", ("hidden",)), LayerTensor("ffn_norm.weight", ("hidden",)),
        LayerTensor("conv.conv.weight", ("hidden", "1", "taps"), ("conv",)),
        LayerTensor("conv.conv.bias", ("hidden",), ("conv", "conv_bias")),
        LayerTensor("conv.in_proj.weight", ("3 hidden", "hidden"), ("conv",)),
        LayerTensor("conv.in_proj.bias", ("3 hidden",), ("conv", "conv_bias")),
        LayerTensor("conv.out_proj.weight", ("hidden", "hidden"), ("conv",)),
        LayerTensor("conv.out_proj.bias", ("hidden",), ("conv", "conv_bias")),
        LayerTensor("self_attn.q_proj.weight", ("query", "hidden"), (FULL,)),
        LayerTensor("self_attn.k_proj.weight", ("key", "hidden"), (FULL,)),
        LayerTensor("self_attn.v_proj.weight", ("key", "hidden"), (FULL,)),
        LayerTensor("self_attn.out_proj.weight", ("hidden", "query"), (FULL,)),
        LayerTensor("self_attn.q_layernorm.weight", ("head",), (FULL,)),
        LayerTensor("self_attn.k_layernorm.weight", ("head",), (FULL,)),
    ),
    {
        "initializer_range": 0.02, "norm_eps": 1e-5, "use_cache": True, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": True, "rope_theta": 1e6, "max_position_embeddings": 128000,
        "num_key_value_heads": 8, "intermediate_size": 12288, "conv_bias": False, "conv_L_cache": 3,
        "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": None, "layer_types": None,
    },
    {"conv_bias": "conv_bias"},
    block="lfm2",
    aliases={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings", "theta": "rope_theta"},
    ffn=_LFM2_FFN,
    ffn_module="feed_forward",
    ffn_norm="ffn_norm.weight",
    ffn_width=_lfm2_width,
    last="model.embedding_norm.weight",
    layer_types=_lfm2_layers,
    sizes=lambda config: {"taps": config["conv_L_cache"]},
)  # fmt: skip


def _qwen3_5_layers(config: Config) -> list[str]:
    every = config["full_attention_interval"]
    return ["linear_attention" if (layer + 1) % every else FULL for layer in range(config["num_hidden_layers"])]


def _qwen3_5_values(config: Config) -> dict[str, Any]:
    """Say every how many layers one attends fully, which some engines read in place of `layer_types`."""
    kinds = config["layer_types"] or _qwen3_5_layers(config)
    return {"full_attention_interval": kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1}


def _qwen3_5_sizes(config: Config) -> dict[str, int]:
    keys, values = (config[f"linear_num_{kind}_heads"] * config[f"linear_{kind}_head_dim"] for kind in ("key", "value"))
    return {
        "linear_values": values,
        "linear_qkv": 2 * keys + values,
        "linear_heads": config["linear_num_value_heads"],
        "linear_head": config["linear_value_head_dim"],
        "taps": config["linear_conv_kernel_dim"],
    }


_LINEAR: Final = ("linear_attention",)
QWEN3_5: Final = DenseFamily(
    "qwen3_5_text",
    (
        LayerTensor("input_layernorm.weight", ("hidden",)), LayerTensor("post_attention_layernorm.weight", ("hidden",)),
        LayerTensor("self_attn.q_proj.weight", ("2 query", "hidden"), (FULL,)),
        LayerTensor("self_attn.q_proj.bias", ("2 query",), (FULL, "qkv_bias")),
        *(LayerTensor(row.name, row.axes, (*row.when, FULL)) for row in (*ATTENTION[2:], *QK_NORM)),
        LayerTensor("linear_attn.conv1d.weight", ("linear_qkv", "1", "taps"), _LINEAR),
        LayerTensor("linear_attn.dt_bias", ("linear_heads",), _LINEAR),
        LayerTensor("linear_attn.A_log", ("linear_heads",), _LINEAR),
        LayerTensor("linear_attn.norm.weight", ("linear_head",), _LINEAR),
        LayerTensor("linear_attn.out_proj.weight", ("hidden", "linear_values"), _LINEAR),
        LayerTensor("linear_attn.in_proj_qkv.weight", ("linear_qkv", "hidden"), _LINEAR),
        LayerTensor("linear_attn.in_proj_z.weight", ("linear_values", "hidden"), _LINEAR),
        LayerTensor("linear_attn.in_proj_b.weight", ("linear_heads", "hidden"), _LINEAR),
        LayerTensor("linear_attn.in_proj_a.weight", ("linear_heads", "hidden"), _LINEAR),
    ),
    DEFAULTS
    | {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 256, "bos_token_id": None,
        "eos_token_id": None, "attention_bias": False, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "rope_parameters": None, "partial_rotary_factor": 0.25, "full_attention_interval": 4, "layer_types": None,
    },
    {"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    block="qwen3_5",
    layer_types=_qwen3_5_layers,
    sizes=_qwen3_5_sizes,
    values=_qwen3_5_values,
    rope="verbatim",
    norm_offset=1.0,
)  # fmt: skip


def _granite_sizes(config: Config) -> dict[str, int]:
    inner = config["mamba_expand"] * config["hidden_size"]
    channels = inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"]
    return {
        "inner": inner,
        "channels": channels,
        "taps": config["mamba_d_conv"],
        "states": config["mamba_n_heads"],
        "mamba_input": inner + channels + config["mamba_n_heads"],
    }


_MAMBA: Final = ("mamba",)
GRANITE_HYBRID: Final = DenseFamily(
    "granitemoehybrid",
    (
        LayerTensor("input_layernorm.weight", ("hidden",)), LayerTensor("post_attention_layernorm.weight", ("hidden",)),
        *(LayerTensor(row.name, row.axes, (*row.when, "attention")) for row in ATTENTION),
        LayerTensor("mamba.A_log", ("states",), _MAMBA), LayerTensor("mamba.D", ("states",), _MAMBA),
        LayerTensor("mamba.dt_bias", ("states",), _MAMBA), LayerTensor("mamba.norm.weight", ("inner",), _MAMBA),
        LayerTensor("mamba.conv1d.weight", ("channels", "1", "taps"), _MAMBA),
        LayerTensor("mamba.conv1d.bias", ("channels",), (*_MAMBA, "mamba_conv_bias")),
        LayerTensor("mamba.in_proj.weight", ("mamba_input", "hidden"), _MAMBA),
        LayerTensor("mamba.in_proj.bias", ("mamba_input",), (*_MAMBA, "mamba_proj_bias")),
        LayerTensor("mamba.out_proj.weight", ("hidden", "inner"), _MAMBA),
        LayerTensor("mamba.out_proj.bias", ("hidden",), (*_MAMBA, "mamba_proj_bias")),
    ),
    {key: value for key, value in GRANITE.defaults.items() if key != "mlp_bias"}
    | {
        "intermediate_size": 11008, "shared_intermediate_size": 1024, "num_local_experts": 8,
        "position_embedding_type": None, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256,
        "mamba_d_head": "auto", "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True,
        "mamba_proj_bias": False, "time_step_limit": None, "layer_types": None,
    },
    {
        "qkv_bias": "attention_bias", "output_bias": "attention_bias", "mamba_conv_bias": "mamba_conv_bias",
        "mamba_proj_bias": "mamba_proj_bias",
    },
    block="granitemoehybrid",
    ffn={
        "gate": FfnProjection("shared_mlp.input_linear.weight", 0, 2),
        "up": FfnProjection("shared_mlp.input_linear.weight", 1, 2),
        "down": FfnProjection("shared_mlp.output_linear.weight"),
    },
    ffn_module="shared_mlp",
    ffn_width="shared_intermediate_size",
    layer_types=lambda config: list(_MAMBA) * config["num_hidden_layers"],
    aliases={"layers_block_type": "layer_types"},
    values=lambda config: {"positions": config["position_embedding_type"]},
    kinds={"linear_attention": "mamba", "full_attention": "attention"},
    sizes=_granite_sizes,
    refusals={"num_local_experts": (0, "it has experts already; only a dense Granite 4 can become one")},
)  # fmt: skip
