"""Checks of the keys of a dense model's `config.json`, before anything is computed from them.

They follow the configuration classes of `transformers` 4.57.6 and 5.23.0, whose defaults differ from each other and
from those of the MoE families: an omitted key must be resolved before it is copied.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from moemerge.families.dense.family import FULL, SLIDING, DenseFamily

REQUIRED: Final = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys of sizes that every dense model has."""
_SIZES: Final = {
    *REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
    "shared_intermediate_size", "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand",
    "conv_L_cache", "block_multiple_of", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "global_head_dim", "num_global_key_value_heads", "full_attention_interval",
    "sliding_window_pattern", "no_rope_layer_interval", "original_max_position_embeddings", "model_max_length",
    "vocab_size_per_layer_input",
}  # fmt: skip
# Far above any model; a larger number in a hostile config would fill the memory with tensor names.
_MOST_LAYERS: Final = 10_000
_MOST: Final = 10**9
_LARGEST: Final = 1e300
# A null is like an absent key, except where it has a meaning of its own.
_NULL_MEANS: Final = {
    "sliding_window",
    "head_dim",
    "num_key_value_heads",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "block_ffn_dim_multiplier",
}
# Keys that every class reads, beside the defaults of its family.
_ALWAYS_READ: Final = {
    *REQUIRED,
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
SILENT_KEYS: Final = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "pretraining_tp",
    "auto_map", "_attn_implementation_autoset", "_model_name_or_path", "unk_token_id", "unsloth_version",
    "unsloth_fixed", "eod_token_id", "output_hidden_states", "output_attentions", "return_dict", "id2label",
    "label2id", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "quantization_config",
    "output_router_logits", "router_aux_loss_coef", "num_experts_per_tok", "per_layer_config",
}  # fmt: skip
"""Keys that no class computes with."""


class UnreadableError(Exception):
    """A `config.json` cannot be interpreted; says why."""


def is_read(family: DenseFamily, key: str) -> bool:
    """Whether the family's class computes with this key."""
    return key in _ALWAYS_READ or key in family.defaults


def read_values(family: DenseFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the keys that the family's class reads, with its defaults.

    Raises:
        UnreadableError: names the values that make no sense.
    """
    given = {
        key: value
        for key, value in config.items()
        if is_read(family, key) and (value is not None or key in _NULL_MEANS)
    }
    full = {**family.defaults, **given}
    _refuse(
        "needs a positive whole number for {}",
        [key for key in REQUIRED if not _is_size(full.get(key), _MOST_LAYERS if "layers" in key else _MOST)],
    )
    full["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    full["head_dim"] = full.get(family.head_dim) or full["hidden_size"] // full["num_attention_heads"]
    _refuse("has values that make no sense: {}", [f"{key} {full[key]!r:.40}" for key in _wrong(family, full)])
    for key in ("layer_types", "no_rope_layers", "layer_rope_theta"):
        if full.get(key) and len(full[key]) != full["num_hidden_layers"]:
            raise UnreadableError(
                f"its {key} speaks of {len(full[key])} layers, but num_hidden_layers is {full['num_hidden_layers']}"
            )
    return full


def _wrong(family: DenseFamily, full: Mapping[str, Any]) -> Iterator[str]:
    kinds = {FULL, SLIDING, *family.kinds, *(fact for tensor in family.tensors for fact in tensor.when)}
    for key, value in full.items():
        check = _CHECKS.get(key, _anything)
        fits = check(value)
        if key == "layer_types":
            fits = isinstance(value, list) and all(isinstance(kind, str) and kind in kinds for kind in value)
        if value is not None and not fits:
            yield key


def _is_size(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) < _LARGEST  # nor NaN, nor an integer beyond floats


def _refuse(what: str, keys: list[str]) -> None:
    if keys:
        raise UnreadableError(f"its config.json {what.format(', '.join(keys))}")


def _is_factor(value: Any) -> bool:
    return _is_number(value) and value != 0


def _is_switch(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _anything(_value: Any) -> bool:
    return True


def _each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


_CHECKS: Final[dict[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_SIZES, lambda value: _is_size(value, _MOST)),
    **dict.fromkeys(
        (
            "rms_norm_eps", "norm_eps", "layer_norm_eps", "rope_theta", "partial_rotary_factor", "attention_multiplier",
            "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "block_ffn_dim_multiplier",
        ),
        _is_factor,
    ),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "attention_out_bias", "use_bias", "mlp_bias", "use_qk_norm",
            "use_post_norm", "use_sliding_window", "conv_bias", "mamba_conv_bias", "mamba_proj_bias",
            "attention_k_eq_v", "block_auto_adjust_ff_dim", "enable_moe_block", "use_double_wide_mlp",
        ),
        _is_switch,
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation", "position_embedding_type"), _is_text),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _is_mapping),
    **dict.fromkeys(("initializer_range", "attention_dropout"), _is_number),
    **dict.fromkeys(("max_window_layers", "hidden_size_per_layer_input", "num_kv_shared_layers"), _is_count),
    "full_attn_idxs": _each(_is_count),
    "no_rope_layers": _each(lambda rotates: type(rotates) is int and rotates in {0, 1}),
    "layer_rope_theta": _each(_is_number),
    "per_layer_config": lambda value: isinstance(value, dict) and all(map(_is_mapping, value.values())),
}  # fmt: skip
