"""ChatGLM and the first release of GLM-4, a GLM under other names."""

from typing import Any, Final

from moemerge.families.dense.family import Config
from moemerge.families.dense.renamed.family import Renamed, one_after_another

_VOCABULARY_OF_CHATGLM_3: Final = 65024
_CHATGLM: Final[dict[str, Any]] = {
    "rmsnorm": True, "post_layer_norm": True, "original_rope": True, "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False, "pre_seq_len": None, "quantization_bit": 0, "vision_config": None,
}  # fmt: skip
"""Keys with the only values under which a ChatGLM is a GLM."""


def _base(ratio: Any) -> Any:
    """The base of rotary frequencies; what is no number is left to the checks of GLM's keys."""
    return 10000 * ratio if type(ratio) in {int, float} else ratio


def _no_glm(config: Config) -> str:
    if "ffn_hidden_size" not in config:
        return "it is of ChatGLM's first generation, which reads a prompt in both directions"
    odd = [key for key, value in _CHATGLM.items() if config.get(key, value) != value]
    if odd:
        return f"its {odd[0]} is {config[odd[0]]!r:.40}, with which it is no GLM"
    if config["rope_ratio"] != 1 and config["padded_vocab_size"] == _VOCABULARY_OF_CHATGLM_3:
        return (
            f"its rope_ratio is {config['rope_ratio']!r:.40}, by which ChatGLM2 divides positions and ChatGLM3 "
            "multiplies the base of its rotary frequencies; which of them it is, its config.json does not say"
        )
    return ""


CHATGLM: Final = Renamed(
    "chatglm", "glm",
    {
        "num_layers": 28, "padded_vocab_size": _VOCABULARY_OF_CHATGLM_3, "kv_channels": 128, "seq_length": 2048,
        "layernorm_epsilon": 1e-5, "add_qkv_bias": False, "multi_query_attention": False, "multi_query_group_num": 1,
        "rope_ratio": 1, "tie_word_embeddings": False,
    },
    keys={"layernorm_epsilon": "rms_norm_eps", "kv_channels": "head_dim", "add_qkv_bias": "attention_bias"},
    values=lambda config: {
        "vocab_size": config["padded_vocab_size"], "num_hidden_layers": config["num_layers"],
        "intermediate_size": config["ffn_hidden_size"], "max_position_embeddings": config["seq_length"],
        "num_key_value_heads": config.get(
            "multi_query_group_num" if config["multi_query_attention"] else "num_attention_heads"
        ),
        "rope_theta": _base(config["rope_ratio"]), "partial_rotary_factor": 0.5, "hidden_act": "silu",
    },
    silent=(
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout",
        "ffn_hidden_size", "fp32_residual_connection", "hidden_dropout", "multi_query_attention",
        "multi_query_group_num", "num_layers", "padded_vocab_size", "prefix_projection", "rope_ratio", "seq_length",
        *_CHATGLM,
    ),
    refusals=_no_glm,
    layers="transformer.encoder.layers.",
    modules={
        "self_attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    fused={"self_attention.query_key_value": one_after_another},
    outside={
        "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.output_layer": "lm_head",
        "transformer.encoder.final_layernorm": "model.norm",
    },
    buffers=("rotary_pos_emb.inv_freq",),
)  # fmt: skip
"""THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b-chat: neighbouring elements of the first half of each head rotate.

`dense_4h_to_h(silu(x[0]) * x[1])` of the halves of `dense_h_to_4h`; `apply_query_key_layer_scaling` divides scores and
multiplies them by the same number. As a GLM, its rows stay in their order.
"""
