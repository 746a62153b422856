"""Gemma 4, whose layers have heads of two sizes and, in E2B and E4B, share keys and have embeddings of their own."""

from typing import Any, Final

from moemerge.families.dense.config_checks import UnreadableError
from moemerge.families.dense.family import BEFORE, FULL, SLIDING, WIDE, Axes, Config, DenseFamily, LayerTensor

_KEYS: Final = "own_keys"


def _layers(config: Config) -> list[str]:
    layers = config["num_hidden_layers"]
    return [SLIDING if (layer + 1) % 6 and layer < layers - 1 else FULL for layer in range(layers)]


def _kinds(config: Config) -> list[str]:
    return config["layer_types"] or _layers(config)


def _layer_facts(config: Config, layer: int) -> frozenset[str]:
    if layer < config["num_hidden_layers"] - config["num_kv_shared_layers"]:
        return frozenset({_KEYS})
    return frozenset({WIDE} if config["use_double_wide_mlp"] else ())


def _values(config: Config) -> dict[str, Any]:
    """Read Gemma 4's settings of layers with full attention, as transformers 5 saves them or as Gemma was released."""
    if (attends := config["use_bidirectional_attention"]) not in (None, "vision"):  # which changes nothing of text
        raise UnreadableError(f"use_bidirectional_attention is {attends!r:.40}: only causal attention was proved")
    own = _of_full_layers(config)
    return {
        "own_values": not config["attention_k_eq_v"],
        "double_ffns": config["use_double_wide_mlp"] and config["num_kv_shared_layers"],
        "global_head_dim": own["head_dim"],
        "num_global_key_value_heads": own.get("num_key_value_heads"),
    }


def _of_full_layers(config: Config) -> dict[str, Any]:
    """The head size of layers with full attention, and their number of key heads where they have one of their own."""
    by_layer, heads = config["per_layer_config"], config["num_global_key_value_heads"]
    if by_layer is None:
        own = {"num_key_value_heads": heads} if config["attention_k_eq_v"] and heads else {}
        return {"head_dim": config["global_head_dim"], **own}
    # A key that a layer has not stands for the number of all layers.
    kinds = _kinds(config)
    full = [by_layer.get(str(layer), {}) for layer, kind in enumerate(kinds) if kind == FULL]
    own = full[0] if full else {}
    others = by_layer.keys() - {str(layer) for layer, kind in enumerate(kinds) if kind == FULL}
    is_read = all(key in {"head_dim", "num_key_value_heads"} and type(value) is int for key, value in own.items())
    if others or any(other != own for other in full) or not is_read:
        raise UnreadableError("its per_layer_config says more than one head_dim of layers with full attention")
    return {"head_dim": config["head_dim"], **own}


def _sizes(config: Config) -> dict[str, int]:
    full = _values(config)
    _refuse_sharing(config)
    head, keys = full["global_head_dim"], full["num_global_key_value_heads"] or config["num_key_value_heads"]
    sizes = {"full_head": head, "full_query": config["num_attention_heads"] * head, "full_key": keys * head}
    if own := config["hidden_size_per_layer_input"]:
        sizes |= {
            "layer_input": own,
            "layer_inputs": own * config["num_hidden_layers"],
            "layer_vocab": config["vocab_size_per_layer_input"],
        }
    return sizes


def _refuse_sharing(config: Config) -> None:
    """Refuse shared keys where no layer has them, and embeddings of layers that tokens lack.

    Raises:
        UnreadableError: says which.
    """
    kinds, shared = _kinds(config), config["num_kv_shared_layers"]
    own, without = kinds[: max(len(kinds) - shared, 0)], kinds[max(len(kinds) - shared, 0) :]
    if missing := sorted(set(without) - set(own)):
        raise UnreadableError(
            f"num_kv_shared_layers is {shared}, which leaves no layer of {missing[0]} with keys of its own"
        )
    rows, vocab = config["vocab_size_per_layer_input"], config["vocab_size"]
    if config["hidden_size_per_layer_input"] and rows < vocab:
        raise UnreadableError(f"vocab_size_per_layer_input is {rows}, and so less than vocab_size, {vocab}")


def _attention(kind: str, head: str, query: str, key: str) -> tuple[LayerTensor, ...]:
    own = (kind, _KEYS)
    return (
        LayerTensor("self_attn.q_proj.weight", (query, "hidden"), (kind,)),
        LayerTensor("self_attn.k_proj.weight", (key, "hidden"), own, lingers=True),
        LayerTensor(
            "self_attn.v_proj.weight", (key, "hidden"), (*own, "own_values") if kind == FULL else own, lingers=True
        ),
        LayerTensor("self_attn.o_proj.weight", ("hidden", query), (kind,)),
        LayerTensor("self_attn.q_norm.weight", (head,), (kind,)),
        LayerTensor("self_attn.k_norm.weight", (head,), own, lingers=True),
    )


_FIRST: Final[dict[str, Axes]] = {
    "model.embed_tokens_per_layer.weight": ("layer_vocab", "layer_inputs"),
    "model.per_layer_model_projection.weight": ("layer_inputs", "hidden"),
    "model.per_layer_projection_norm.weight": ("layer_input",),
}
GEMMA4: Final = DenseFamily(
    "gemma4_text",
    (
        *(
            LayerTensor(f"{name}_layernorm.weight", ("hidden",))
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        ),
        LayerTensor("layer_scalar", ("1",)),
        LayerTensor("per_layer_input_gate.weight", ("layer_input", "hidden"), ("layer_inputs",)),
        LayerTensor("per_layer_projection.weight", ("hidden", "layer_input"), ("layer_inputs",)),
        LayerTensor("post_per_layer_input_norm.weight", ("hidden",), ("layer_inputs",)),
        *_attention(SLIDING, "head", "query", "key"),
        *_attention(FULL, "full_head", "full_query", "full_key"),
    ),
    {
        "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": True, "attention_dropout": 0.0,
        "max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256, "rope_parameters": None,
        "attention_bias": False, "sliding_window": 512, "final_logit_softcapping": None,
        "use_bidirectional_attention": None, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
        "attention_k_eq_v": False, "num_kv_shared_layers": 0, "enable_moe_block": False, "use_double_wide_mlp": False,
        "global_head_dim": 512, "num_global_key_value_heads": None, "per_layer_config": None,
        "layer_types": None,
    },
    {
        "own_values": "own_values", "layer_inputs": "hidden_size_per_layer_input",
        "shared_keys": "num_kv_shared_layers", "wide_ffns": "double_ffns",
    },
    block="gemma4",
    ffn_norm="pre_feedforward_layernorm.weight",
    around_ffn=f"{BEFORE} and what they give",
    first_if={"layer_inputs": _FIRST},
    layer_types=_layers,
    layer_facts=_layer_facts,
    sizes=_sizes,
    values=_values,
    rope="verbatim",
    refusals={
        "enable_moe_block": (False, "it has experts already"),
        "attention_bias": (False, "biases were not proved"),
    },
)  # fmt: skip
