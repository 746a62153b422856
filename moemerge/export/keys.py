"""GGUF keys that say what the model computes, taken from its `config.json`; those of llama.cpp's converter."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from moemerge.export.families import Config, GgufFamily, Value
from moemerge.export.key_values import head_width, whole_layers
from moemerge.families.llama3_rope import llama3_factors

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The method of `gguf.GGUFWriter`, and the keys of config.json of which the first that is there counts.
_SIZES: Final = (
    ("add_context_length", ("max_position_embeddings",)),
    ("add_embedding_length", ("hidden_size",)),
    ("add_feed_forward_length", ("prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size")),
    ("add_head_count", ("num_attention_heads",)),
    ("add_head_count_kv", ("num_key_value_heads",)),
)
_NUMBERS: Final = (
    ("add_layer_norm_rms_eps", ("rms_norm_eps", "norm_eps")),
    ("add_layer_norm_eps", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
    ("add_expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("add_expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    ("add_expert_group_count", ("n_group",)),
    ("add_expert_group_used_count", ("topk_group",)),
)
_YARN: Final = (
    ("add_rope_scaling_yarn_ext_factor", ("extrapolation_factor",)),
    ("add_rope_scaling_yarn_attn_factor", ("attention_factor", "attn_factor")),
    ("add_rope_scaling_yarn_beta_fast", ("beta_fast",)),
    ("add_rope_scaling_yarn_beta_slow", ("beta_slow",)),
)
_GATING: Final = ("score_function", "scoring_func", "score_func", "moe_router_activation", "expert_selection_fn")
# Methods whose value is one of a choice, with the choice's name in the package.
_CHOICES: Final = {"add_rope_scaling_type": "RopeScalingType", "add_expert_gating_func": "ExpertGatingFuncType"}
_ROPE_OF_ALL: Final = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def add_keys(writer: "GGUFWriter", family: GgufFamily, config: Config, file_type: int) -> None:
    """Add keys for what the model computes, its sizes first."""
    config = {**config, **{key: value_of(value, config) for key, value in family.replaces}}
    writer.add_block_count(config["num_hidden_layers"])
    _add(writer, _SIZES, config)
    _add_rope(writer, rope_parameters(config))
    _add(writer, _NUMBERS, config)
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_file_type(file_type)
    for method, made in dict((("add_expert_gating_func", _gating), *family.keys)).items():
        value = value_of(made, config)
        if value is not None:
            _call(writer, method, value)


def value_of(value: Value, config: Config) -> Any:
    """Compute the value of a key; None where there is none."""
    return config.get(value) if isinstance(value, str) else value(config)


def _gating(config: Config) -> str | None:
    """Name the function that turns router logits into weights, where the config says it."""
    found = _first(config, _GATING)
    return None if found is None else str(found).upper()


def _call(writer: "GGUFWriter", method: str, value: Any) -> None:
    import gguf

    getattr(writer, method)(getattr(gguf, _CHOICES[method])[value] if method in _CHOICES else value)


def rope_parameters(config: Config) -> dict[str, Any]:
    """Find the settings of rotary positions under any of their names in `config.json`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "full_attention" in found or "sliding_attention" in found:
        return found
    if "rope_type" not in found and "type" in found:
        found["rope_type"] = found["type"]
    for key in _ROPE_OF_ALL:
        if found.get(key) is None and config.get(key) is not None:
            found[key] = config[key]
    return found


def _add_rope(writer: "GGUFWriter", parameters: Mapping[str, Any]) -> None:
    rope = parameters.get("full_attention", parameters)
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind in {"linear", "yarn"} and factor is not None:
        _call(writer, "add_rope_scaling_type", kind.upper())
        writer.add_rope_scaling_factor(factor)
    if kind == "yarn" and factor is not None:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        _add(writer, _YARN, rope)
    if kind == "longrope":
        _call(writer, "add_rope_scaling_type", "LONGROPE")
    if rope.get("rope_theta") is not None:
        writer.add_rope_freq_base(rope["rope_theta"])
    local = parameters.get("sliding_attention", {}).get("rope_theta")
    if local is not None:
        writer.add_rope_freq_base_swa(local)


def rope_factors(config: Config) -> NDArray[np.float32] | None:
    """The divisors by which llama3's scaling slows each frequency (head width / 2,); None without such a scaling."""
    parameters = rope_parameters(config)
    rope = parameters.get("full_attention", parameters)
    if str(rope.get("rope_type")).lower() != "llama3":
        return None
    return llama3_factors(rope, head_width(config))


def proportional_factors(config: Config) -> NDArray[np.float32]:
    """The divisors of Gemma 4's frequencies in layers without a window (head width / 2,); most turn nothing."""
    rope = config["rope_parameters"]["full_attention"]
    width = whole_layers("head_dim", "global_head_dim")(config)
    turned = int(width * rope["partial_rotary_factor"] / 2)
    return np.concatenate([np.ones(turned, np.float32), np.full(width // 2 - turned, 1e30, np.float32)])


def _add(writer: "GGUFWriter", table: Sequence[tuple[str, Sequence[str]]], values: Mapping[str, Any]) -> None:
    for method, keys in table:
        value = _first(values, keys)
        if value is not None:
            getattr(writer, method)(value)


def _first(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((values[key] for key in keys if key in values), None)
