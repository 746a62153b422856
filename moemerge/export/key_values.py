"""Values of GGUF keys that are computed from several keys of `config.json`, and configs that llama.cpp cannot load."""

from collections.abc import Callable
from typing import Any

from moemerge.export.families import Config, GgufFamily


def truthy(key: str) -> Callable[[Config], Any]:
    """A function for the value of a key, which is left out where it is 0."""
    return lambda config: config.get(key) or None


def constant(value: Any) -> Callable[[Config], Any]:
    """A function for a value that is the same for every model."""
    return lambda _config: value


def head_width(config: Config) -> int:
    """The width of a head in elements."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotated_width(config: Config) -> int:
    """The number of elements in a head that rotary positions turn; half of the head by default, as in GLM's models."""
    rope = config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return int(head_width(config) * (0.5 if part is None else part))


def is_sliding(config: Config) -> list[bool]:
    """Whether each layer sees only a window."""
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def heads_by_layer(config: Config) -> list[int]:
    """The number of key heads of each layer, 0 where it does not attend."""
    heads = config["num_key_value_heads"]
    return [heads if kind in {"attention", "full_attention"} else 0 for kind in config["layer_types"]]


def dense_lead(config: Config) -> int:
    """The number of layers at the beginning that hold no experts."""
    kinds = config.get("mlp_layer_types") or []
    return next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))


def shared_width(config: Config) -> int:
    """The neurons of all shared experts together."""
    return int(config["moe_intermediate_size"] * config.get("num_shared_experts", 1))


def first_of(key: str) -> Callable[[Config], Any]:
    """A function for the value that a key has in the first layer, and so in every layer."""
    return lambda config: config[key][0]


def key_width(config: Config) -> int:
    """The width of a compressed state together with what positions turn."""
    return int(config["kv_lora_rank"] + config["qk_rope_head_dim"])


def key_head_width(config: Config) -> int:
    """The width of a head's keys that are made of a compressed state."""
    return int(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])


def yarn_log_factor(config: Config) -> float | None:
    """A tenth of yarn's `mscale_all_dim`, which is what llama.cpp expects of this family."""
    found = (config.get("rope_parameters") or {}).get("mscale_all_dim")
    return None if found is None else 0.1 * found


def whole_layers(key: str, other: str) -> Callable[[Config], Any]:
    """A function for a setting of layers without a window, else the model's under another name; None without either."""

    def value(config: Config) -> Any:
        by_layer = config.get("per_layer_config") or {}
        kinds = config["layer_types"]
        own = [by_layer.get(str(layer), {}).get(key) for layer, kind in enumerate(kinds) if kind == "full_attention"]
        return next((found for found in own if found is not None), config.get(other))

    return value


def key_heads_of_kinds(config: Config) -> list[int] | None:
    """The number of key heads of each layer, where layers without a window have another."""
    whole = whole_layers("num_key_value_heads", "num_global_key_value_heads")(config)
    windowed = config["num_key_value_heads"]
    return None if whole is None else [windowed if sliding else whole for sliding in is_sliding(config)]


def is_not_proportional(config: Config) -> bool:
    """Whether layers without a window turn positions otherwise than Gemma 4's."""
    return bool(config["rope_parameters"]["full_attention"].get("rope_type") != "proportional")


def has_layer_inputs(config: Config) -> bool:
    """Whether layers have embeddings of their own, or share keys, as in mixtures of Gemma 4 E2B and E4B."""
    return bool(config.get("hidden_size_per_layer_input") or config.get("num_kv_shared_layers"))


def state_width(config: Config) -> int:
    """The width of states in layers with states, which the model need not have."""
    return int(config["mamba_expand"] * config["hidden_size"])


# ---- what llama.cpp cannot load


def has_wide_heads(config: Config) -> bool:
    """Whether heads have another width than the hidden state divided by their number."""
    return head_width(config) * int(config["num_attention_heads"]) != int(config["hidden_size"])


def has_grouped_heads(config: Config) -> bool:
    """Whether there are fewer key heads than query heads."""
    return bool(config["num_key_value_heads"] != config["num_attention_heads"])


def has_no_shared(config: Config) -> bool:
    """Whether there is no shared expert."""
    return not (config.get("n_shared_experts") or config.get("num_shared_experts"))


def has_states(config: Config) -> bool:
    """Whether layers keep a state in place of keys and values."""
    return 0 in heads_by_layer(config)


def has_shared(config: Config) -> bool:
    """Whether there is a shared expert."""
    return bool(config.get("moe_num_shared_experts"))


def has_no_window(config: Config) -> bool:
    """Whether every layer sees everything."""
    return not (config.get("sliding_window") and any(is_sliding(config)))


def has_window(config: Config) -> bool:
    """Whether some layers see only a window."""
    return bool(config.get("sliding_window"))


def has_yarn(config: Config) -> bool:
    """Whether rotary positions are scaled by yarn."""
    return any(rope.get("rope_type") == "yarn" for rope in _ropes(config))


def is_partly_unrotated(config: Config) -> bool:
    """Whether rotary positions turn nothing in some layers."""
    return not all(config.get("layer_rope_theta") or [True])


def has_dense(config: Config) -> bool:
    """Whether a layer holds no experts."""
    kinds = config.get("mlp_layer_types") or []
    return bool(config.get("mlp_only_layers") or "dense" in kinds or config.get("first_k_dense_replace"))


def has_late_dense(config: Config) -> bool:
    """Whether a layer without experts comes after one with them."""
    kinds = config.get("mlp_layer_types") or []
    return "dense" in kinds[dense_lead(config) :]


def ends_dense(config: Config) -> bool:
    """Whether a layer without experts comes after one with them, by the keys of Ernie's models."""
    return bool(config["moe_layer_end_index"] not in {-1, config["num_hidden_layers"] - 1})


def has_other_activation(config: Config) -> bool:
    """Whether FFNs have another activation than llama.cpp's: SiLU for all families but Gemma, whose key it is: GELU."""
    given = config.get("hidden_act") not in {None, "silu", "swish"}
    return given or config.get("hidden_activation") not in {None, "gelu_pytorch_tanh"}


def _has_rope(kind: str) -> Callable[[Config], bool]:
    """A function that tells whether rotary positions are scaled in some way."""
    return lambda config: any(rope.get("rope_type", rope.get("type")) == kind for rope in _ropes(config))


def _ropes(config: Config) -> list[Config]:
    """List the settings of rotary positions of each kind of layers, under any of their names in the config."""
    found = [config.get("rope_parameters") or {}, config.get("rope_scaling") or {}]
    return [*found, *(value for rope in found for value in rope.values() if isinstance(value, dict))]


LLAMA3 = "knows no llama3 scaling of its rotary positions"
MSCALE = "ignores mscale in yarn's scaling of rotary positions"


def lacks(family: GgufFamily, config: Config) -> list[str]:
    """List what the family has no tensors for, or wants and does not find, according to a checkpoint's config."""
    head, groups = family.whole.get("output.weight"), {part.group for part in family.layer.values()}
    tied = config.get("tie_word_embeddings")
    reasons = {
        "loads it only with experts in every layer": has_dense(config) and "dense" not in groups,
        "knows no biases in its attention": config.get("attention_bias") and "attn_q.bias" not in family.layer,
        "does not load it with tied embeddings": tied is True and head is not None and head.needed,
        "knows no head in it beside the embeddings": tied is False and head is None,
        "knows no shared expert in it": config.get("num_shared_experts") and "ffn_up_shexp.weight" not in family.layer,
    }
    return [reason for reason, holds in reasons.items() if holds]


ROPES = (
    (_has_rope("llama3"), LLAMA3),
    (_has_rope("longrope"), "ignores longrope's factors"),
    (lambda config: any("mscale" in rope for rope in _ropes(config)), MSCALE),
)
"""Scalings of rotary positions that most families' files cannot hold, with the words for it."""
ACTIVATION = (has_other_activation, "computes another activation in its FFNs than config.json says")
"""A refusal for every family: a condition, and the words for it."""
LENGTH_IGNORED = (
    _has_rope("dynamic"),
    "llama.cpp scales no rotary positions by the length: it is right for texts up to max_position_embeddings",
)
"""A note for every family."""
