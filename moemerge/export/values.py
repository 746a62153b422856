"""Values of GGUF keys that no key of `config.json` holds as they are, and what of a config llama.cpp cannot load."""

from collections.abc import Callable
from typing import Any

from moemerge.export.families import Config, GgufFamily


def truthy(key: str) -> Callable[[Config], Any]:
    """The value of a key, which is left out where it is 0."""
    return lambda config: config.get(key) or None


def constant(value: Any) -> Callable[[Config], Any]:
    """The same for every model."""
    return lambda _config: value


def head_width(config: Config) -> int:
    """Elements of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotated_width(config: Config) -> int:
    """Elements of a head that rotary positions turn; half of them where nothing is said, as in GLM's models."""
    rope = config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return int(head_width(config) * (0.5 if part is None else part))


def is_sliding(config: Config) -> list[bool]:
    """Of each layer, whether it sees a window alone."""
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def heads_by_layer(config: Config) -> list[int]:
    """Of each layer its key heads, none where it does not attend."""
    heads = config["num_key_value_heads"]
    return [heads if kind in {"attention", "full_attention"} else 0 for kind in config["layer_types"]]


def dense_lead(config: Config) -> int:
    """How many layers at the beginning hold no experts."""
    kinds = config.get("mlp_layer_types") or []
    return next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))


def shared_width(config: Config) -> int:
    """Neurons of all shared experts together."""
    return int(config["moe_intermediate_size"] * config.get("num_shared_experts", 1))


def first_of(key: str) -> Callable[[Config], Any]:
    """What a key says of the first layer, which it says of every layer."""
    return lambda config: config[key][0]


def key_width(config: Config) -> int:
    """Of a compressed state beside what positions turn."""
    return int(config["kv_lora_rank"] + config["qk_rope_head_dim"])


def key_head_width(config: Config) -> int:
    """Of a head's keys that are made of one."""
    return int(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])


def yarn_log_factor(config: Config) -> float | None:
    """A tenth of yarn's `mscale_all_dim`, as llama.cpp has it of this family."""
    found = (config.get("rope_parameters") or {}).get("mscale_all_dim")
    return None if found is None else 0.1 * found


def whole_layers(key: str, other: str) -> Callable[[Config], Any]:
    """What layers without a window have for a key, or the model by another name; None where nothing is said."""

    def value(config: Config) -> Any:
        by_layer = config.get("per_layer_config") or {}
        kinds = config["layer_types"]
        own = [by_layer.get(str(layer), {}).get(key) for layer, kind in enumerate(kinds) if kind == "full_attention"]
        return next((found for found in own if found is not None), config.get(other))

    return value


def key_heads_of_kinds(config: Config) -> list[int] | None:
    """Of each layer its key heads, where those without a window have others."""
    whole = whole_layers("num_key_value_heads", "num_global_key_value_heads")(config)
    windowed = config["num_key_value_heads"]
    return None if whole is None else [windowed if sliding else whole for sliding in is_sliding(config)]


def is_not_proportional(config: Config) -> bool:
    """Whether layers without a window turn positions otherwise than Gemma 4's."""
    return bool(config["rope_parameters"]["full_attention"].get("rope_type") != "proportional")


def state_width(config: Config) -> int:
    """Of layers with states, which the model need not have."""
    return int(config["mamba_expand"] * config["hidden_size"])


# ---- what llama.cpp cannot load


def has_wide_heads(config: Config) -> bool:
    """Whether heads are of another width than the hidden state through their number."""
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
    """Whether there is one."""
    return bool(config.get("moe_num_shared_experts"))


def has_no_window(config: Config) -> bool:
    """Whether every layer sees everything."""
    return not (config.get("sliding_window") and any(is_sliding(config)))


def has_window(config: Config) -> bool:
    """Whether layers see a window alone."""
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
    """The same of Ernie's models."""
    return bool(config["moe_layer_end_index"] not in {-1, config["num_hidden_layers"] - 1})


def has_other_activation(config: Config) -> bool:
    """Whether FFNs have another activation than llama.cpp's: of all families SiLU, of Gemma, whose key it is, GELU."""
    given = config.get("hidden_act") not in {None, "silu", "swish"}
    return given or config.get("hidden_activation") not in {None, "gelu_pytorch_tanh"}


def _has_rope(kind: str) -> Callable[[Config], bool]:
    """Whether rotary positions are scaled in some way."""
    return lambda config: any(rope.get("rope_type", rope.get("type")) == kind for rope in _ropes(config))


def _ropes(config: Config) -> list[Config]:
    """Settings of rotary positions, by whichever of their names the config has them, of each kind of layers."""
    found = [config.get("rope_parameters") or {}, config.get("rope_scaling") or {}]
    return [*found, *(value for rope in found for value in rope.values() if isinstance(value, dict))]


LLAMA3 = "knows no llama3 scaling of its rotary positions"
MSCALE = "ignores mscale in yarn's scaling of rotary positions"


def lacks(family: GgufFamily, config: Config) -> list[str]:
    """What of a checkpoint a family has no tensors for, or wants and does not find, as its config says."""
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
"""Scalings of rotary positions that most families' files cannot hold, and how to say so."""
ACTIVATION = (has_other_activation, "computes another activation in its FFNs than config.json says")
"""Of any family, and how to say so."""
LENGTH_IGNORED = (
    _has_rope("dynamic"),
    "llama.cpp scales no rotary positions by the length: it is right for texts up to max_position_embeddings",
)
"""A note of any family."""
