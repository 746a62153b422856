"""Every model type that is read as another: the arithmetic of each, with its source.

The sources are the modelling and configuration code in the models' repositories on the Hub; names such as `w1` are
theirs. A default is that of the configuration class, where it differs from that of the dense family.
"""

from typing import Any, Final

from moemerge.families.dense.family import Config
from moemerge.families.dense.renamed.chatglm import CHATGLM
from moemerge.families.dense.renamed.family import Renamed, by_key_head, one_after_another
from moemerge.families.dense.renamed.scaled import MINICPM

_EXECUTION: Final = ("attn_implementation",)
_BIASED: Final = {"bias": "attention_bias"}


def _internlm_rope(config: Config) -> dict[str, Any]:
    rotary = config["rotary"] if isinstance(config["rotary"], dict) else {}
    scaled = {"rope_type": rotary.get("type"), "factor": rotary.get("scaling_factor", 1.0)}
    return {"rope_theta": rotary.get("base"), "rope_scaling": None if rotary.get("type") == "origin" else scaled}


INTERNLM: Final = Renamed(
    "internlm", "llama",
    {"bias": True, "rotary": {"base": 10000, "type": "dynamic"}, "rms_norm_eps": 1e-6, "pad_token_id": 0},
    keys=_BIASED,
    values=_internlm_rope,
    silent=("rotary", *_EXECUTION),
)  # fmt: skip
"""internlm/internlm-7b: a Llama with biases on all four projections of the attention, and NTK by length."""
INTERNLM2: Final = Renamed(
    "internlm2", "llama",
    {"bias": True, "rms_norm_eps": 1e-6, "pad_token_id": 0},
    keys=_BIASED,
    silent=_EXECUTION,
    modules={
        "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    },
    fused={"attention.wqkv": by_key_head},
    outside={"model.tok_embeddings": "model.embed_tokens", "output": "lm_head"},
)  # fmt: skip
"""internlm/internlm2-7b: `wqkv` holds, for each key head, its queries' heads, the key and the value head.

The code divides it as `(h gs d)` with `gs` the queries of a key head and two more; `w2(silu(w1(x)) * w3(x))`.
"""
INTERNLM3: Final = Renamed(
    "internlm3", "llama",
    {
        "rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "pad_token_id": 2,
    },
    keys={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    refusals=lambda config: (
        "its qkv_bias differs from its bias, which transformers does not compute either"
        if config.get("qkv_bias", False) != config.get("bias", False)
        else ""
    ),
)  # fmt: skip
"""internlm/internlm3-8b-instruct, which transformers 5.23 has as a Llama too, with these keys and this refusal."""
EXAONE: Final = Renamed(
    "exaone", "llama",
    {
        "rms_norm_eps": 1e-6, "bos_token_id": 0, "tie_word_embeddings": True, "hidden_act": "silu",
        "intermediate_size": None,
    },
    keys={"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"},
    values=lambda config: {"intermediate_size": config["intermediate_size"] or _times(config.get("hidden_size"), 4)},
    silent=("embed_dropout", "resid_dropout"),
    layers="transformer.h.",
    modules={
        **{f"attn.attention.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"},
        "attn.attention.out_proj": "self_attn.o_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        "mlp.c_fc_0": "mlp.gate_proj", "mlp.c_fc_1": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    },
    outside={"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"},
)  # fmt: skip
"""LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct, 3.5 and Deep: `c_proj(act(c_fc_0(x)) * c_fc_1(x))`, halves of heads rotated."""
YI: Final = Renamed(
    "Yi", "llama",
    {
        "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 5000000.0, "max_position_embeddings": 4096,
        "pad_token_id": 0,
    },
    modules={"ln1": "input_layernorm", "ln2": "post_attention_layernorm"},
)  # fmt: skip
"""01-ai/Yi-6B and 34B before they were converted: a Llama whose norms are called `ln1` and `ln2`."""
MIMO: Final = Renamed(
    "mimo", "qwen2",
    {},
    refusals=lambda config: "its use_mrope was not proved" if config.get("use_mrope") else "",
    silent=("use_mrope", "attention_bias", "num_nextn_predict_layers"),
    further="model.mtp_layers.",
)  # fmt: skip
"""XiaomiMiMo/MiMo-7B-Base: its classes extend Qwen2's by layers that predict further tokens."""
AQUILA: Final = Renamed(
    "aquila", "llama",
    {"pad_token_id": 0},
    notes=lambda _config: ("its own code keeps attention scores between -1024 and 1024, which no output family does",),
)  # fmt: skip
"""BAAI/AquilaChat2-7B and 34B: a Llama by its tensors and, for vLLM and text-generation-inference, by its code."""
XVERSE: Final = Renamed("xverse", "llama", {"max_position_embeddings": 8192}, silent=("initializer_weight",))
"""xverse/XVERSE-7B and 13B: a Llama."""
IQUESTCODER: Final = Renamed(
    "iquestcoder", "llama",
    {"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    refusals=lambda config: next(
        (
            f"its {key} is {config[key]!r:.40}, which transformers does not compute either"
            for key in ("clip_qkv", "use_sliding_window")
            if config.get(key)
        ),
        "",
    ),
    silent=("clip_qkv", "use_sliding_window"),
)  # fmt: skip
"""IQuestLab/IQuest-Coder-V1-40B-Instruct, which transformers 5.23 has as a Llama too, with this refusal."""
PANGU: Final = Renamed(
    "PanguEmbedded", "llama",
    {
        "bias": True, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 16000000.0, "pad_token_id": 0, "eos_token_id": 45892,
    },
    keys=_BIASED,
)  # fmt: skip
"""openPangu-Embedded: its classes extend Llama's by biases on all four projections of the attention."""


def _uses_alibi(config: Config) -> bool:
    return "max_position_embeddings" not in config or config.get("num_attention_heads") == _HEADS_OF_13B


_HEADS_OF_13B: Final = 40
_VOCABULARY_OF_2: Final = 125696
BAICHUAN: Final = Renamed(
    "baichuan", "llama",
    {"rms_norm_eps": 1e-6, "pad_token_id": 0},
    refusals=lambda config: (
        "its positions are ALiBi's, as in Baichuan 13B, and every output family has rotary ones"
        if _uses_alibi(config)
        else ""
    ),
    silent=("model_max_length", "z_loss_weight"),
    fused={"self_attn.W_pack": one_after_another},
    unit_head=lambda config: "z_loss_weight" in config or config.get("vocab_size") == _VOCABULARY_OF_2,
)  # fmt: skip
"""baichuan-inc/Baichuan-7B and Baichuan2-7B, whose head divides its rows by their lengths (NormHead).

vLLM too knows Baichuan 2 by its vocabulary of 125696. Configs of 13B have a `model_max_length` alone.
"""
QWEN: Final = Renamed(
    "qwen", "qwen2",
    {
        "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000.0, "rotary_pct": 1.0, "kv_channels": 128, "no_bias": True,
        "seq_length": 2048, "intermediate_size": 22016, "use_dynamic_ntk": True, "use_logn_attn": True,
    },
    keys={"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta", "kv_channels": "head_dim"},
    values=lambda config: {
        "intermediate_size": _halved(config["intermediate_size"]), "hidden_act": "silu",
        "num_key_value_heads": config.get("num_attention_heads"), "max_position_embeddings": config["seq_length"],
        "use_sliding_window": False,
    },
    silent=(
        "attn_dropout_prob", "bf16", "emb_dropout_prob", "fp16", "fp32", "no_bias", "onnx_safe", "rotary_pct",
        "scale_attn_weights", "seq_length", "softmax_in_fp32", "tokenizer_class", "use_cache_kernel",
        "use_cache_quantization", "use_dynamic_ntk", "use_flash_attn", "use_logn_attn",
    ),
    refusals=lambda config: next(
        (
            f"its {key} is {config[key]!r:.40}, which no released Qwen has and was not proved"
            for key, value in (("rotary_pct", 1.0), ("no_bias", True))
            if config[key] != value
        ),
        "",
    ),
    layers="transformer.h.",
    modules={
        "attn.c_proj": "self_attn.o_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        "mlp.w2": "mlp.gate_proj", "mlp.w1": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    },
    fused={"attn.c_attn": one_after_another},
    outside={"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"},
    buffers=(".masked_bias", ".rotary_emb.inv_freq"),
    notes=lambda config: (
        (
            f"beyond {config.get('seq_length', 2048)} tokens its own code scales positions and queries by the length "
            "(use_dynamic_ntk, use_logn_attn), which no output family does",
        )
        if config.get("use_dynamic_ntk", True) or config.get("use_logn_attn", True)
        else ()
    ),
)  # fmt: skip
"""Qwen/Qwen-7B, of the first generation: `c_proj(w1(x) * silu(w2(x)))`, each half as wide as `intermediate_size`."""


def _halved(value: Any) -> Any:
    return value // 2 if type(value) is int else value


def _times(value: Any, factor: int) -> Any:
    return value * factor if type(value) is int else value


RENAMED: Final = {
    renamed.model_type: renamed
    for renamed in (
        INTERNLM, INTERNLM2, INTERNLM3, EXAONE, YI, MIMO, AQUILA, XVERSE, IQUESTCODER, PANGU, BAICHUAN, QWEN,
        MINICPM, CHATGLM,
    )
}  # fmt: skip
"""Renamed model types by name."""
