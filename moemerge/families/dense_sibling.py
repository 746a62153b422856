"""The dense `config.json` that says what a mixture computes beside its experts."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from moemerge.families.choosing import SCALES
from moemerge.families.dense import DENSE_FAMILIES, FULL, SLIDING, DenseFamily, DenseModel, read_dense
from moemerge.families.family import NULLABLE, MoeFamily
from moemerge.families.respelling import lost_keys

SIBLINGS: Final = {
    "mixtral": ("llama", "mistral"),
    "qwen3_moe": ("qwen3",),
    "granitemoe": ("llama", "granite"),
    "granitemoeshared": ("llama", "granite"),
    "granitemoehybrid": ("llama", "granite", "granitemoehybrid"),
    "granitemoe_swa": ("llama", "granite", "mistral", "ministral", "smollm3", "granite_swa"),
    "glm4_moe": ("llama", "qwen2", "qwen3", "phi3", "glm"),
    "dots1": ("qwen3",),
    "qwen2_moe": ("llama", "mistral", "ministral", "qwen2"),
    "flex_olmo": ("olmo2",),
    "ernie4_5_moe": ("ernie4_5",),
    "hunyuan_v1_moe": ("hunyuan_v1_dense",),
    "lfm2_moe": ("lfm2",),
    "cohere2_moe": ("cohere2",),
    "qwen3_5_moe_text": ("qwen3_5_text",),
    "gemma4_text": ("gemma4_text",),
    "deepseek_v3": ("youtu",),
    "mellum": ("qwen3",),
    "exaone_moe": ("qwen3",),
    "hy_v3": ("qwen3",),
    "mimo_v2_flash": ("llama", "mistral", "ministral"),
    "solar_open": ("llama", "qwen2"),
}
"""Dense families that may compute like a mixture with one expert alone, the one that most programs read first."""

_CLASSES: Final = {
    "llama": "Llama", "mistral": "Mistral", "ministral": "Ministral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "phi3": "Phi3", "granite": "Granite", "granite_swa": "GraniteSWA", "granitemoehybrid": "GraniteMoeHybrid",
    "smollm3": "SmolLM3", "olmo2": "Olmo2", "ernie4_5": "Ernie4_5", "hunyuan_v1_dense": "HunYuanDenseV1",
    "lfm2": "Lfm2", "cohere2": "Cohere2", "qwen3_5_text": "Qwen3_5", "gemma4_text": "Gemma4", "youtu": "Youtu",
    "glm": "Glm",
}  # fmt: skip
# Keys that say how routers choose, settings of training, and what the tensors or other keys say as well: an expert
# computes the same whatever they are.
_OF_NO_MATTER: Final = {
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "decoder_sparse_step", "n_group",
    "topk_group", "scoring_func", "topk_method", "expert_selection_fn", "shared_expert_combination_strategy",
    "moe_layer_interval", "moe_norm_min", "use_expert_bias", "use_mixed_mlp_moe", "enable_moe_fp32_combine",
    "num_nextn_predict_layers", "max_window_layers", "sliding_window_pattern", "prefix_dense_sliding_window_pattern",
    "qkv_bias", "attention_bias", "qk_norm", "use_qk_norm", "use_sliding_window", "sliding_window",
}  # fmt: skip
# What transformers' classes take for keys that config.json leaves out, where it is not what a merge writes.
_ABSENT: Final[Mapping[str, Mapping[str, Any]]] = {
    "mimo_v2_flash": {"attention_value_scale": 0.707},
    "glm4_moe": {"partial_rotary_factor": 0.5},
}
_WHY: Final = {
    "norm_topk_prob": ": the weights of the chosen experts do not add up to 1, so that no expert has a size of its own"
}
# Scales that a family may write, with what is meant where it does not.
_MULTIPLIERS: Final = dict.fromkeys(
    ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)
# Other values of the same names that must be what the dense model computes.
_COMPARED: Final = ("layer_rope_theta", "positions", "granite_kinds", "all_sliding", "head_dim")
# Without them each class computes with a number of its own.
_NEEDED: Final = (
    "rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_theta", "max_position_embeddings", "num_key_value_heads",
)  # fmt: skip
_ALWAYS: Final = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_BIASES: Final = ("attention_bias", "use_bias")
# What says of a family with experts that a model has none, or how wide its FFN is.
_DENSE_ALONE: Final = {
    "num_local_experts": 0, "enable_moe_block": False, "block_auto_adjust_ff_dim": False, "use_double_wide_mlp": False,
}  # fmt: skip
# Families that tell their layers apart as their mixtures do.
_SAME_LAYERS: Final = ("lfm2", "cohere2", "qwen3_5_text", "gemma4_text", "granitemoehybrid", "granite_swa")


def _setting(family: MoeFamily, config: Mapping[str, Any], key: str) -> Any:
    """The value of a mixture's key; where `config.json` leaves it out, what transformers takes instead, if known."""
    value = config.get(key)
    absent = {**family.fixed, **family.router_defaults, **_ABSENT.get(family.model_type, {})}
    return absent.get(key) if value is None else value


def dense_sibling(
    family: MoeFamily,
    config: Mapping[str, Any],
    width: int,
    holds: Callable[[str], bool],
    misfits: Callable[[DenseModel], list[str]],
) -> tuple[dict[str, Any], DenseModel]:
    """Find the dense model that computes what a mixture computes, with FFNs of `width` neurons in place of experts.

    Args:
        family: the mixture's family.
        config: its `config.json`.
        width: number of neurons in each FFN.
        holds: whether the model has a tensor of this name, within its layers or outside, that does something.
        misfits: names the tensors that a dense model lacks, and those that have no place in it.

    Returns:
        A `config.json`, and what it says.

    Raises:
        ValueError: no dense family computes the same; its arguments are the reasons.
    """
    config = {**lost_keys(family, config), **config}
    problems = [*_unusual(family, config)]
    siblings = SIBLINGS.get(family.model_type, ())
    if not siblings:
        problems.append(f"no dense family that moemerge reads computes like {family.model_type}")
    for name in () if problems else siblings:
        made = _config(DENSE_FAMILIES[name], family, config, width, holds)
        model = read_dense(made)
        if isinstance(model, str):
            problems.append(f"{name}: {model}")
        elif found := [*_differences(family, config, model)] or misfits(model):
            problems.append(f"{name}: {'; '.join(found)}")
        else:
            return made, model
    raise ValueError(*problems)


def _unusual(family: MoeFamily, config: Mapping[str, Any]) -> Iterator[str]:
    """Say what of a mixture's settings its family's table does not know."""
    ignored = {*_OF_NO_MATTER, *SCALES, *family.carried}
    for key in family.fixed.keys() - ignored:
        found = _setting(family, config, key)
        if found != family.fixed[key]:
            yield f"its {key} is {found!r:.40}, expected {family.fixed[key]!r}{_WHY.get(key, '')}"
    if missing := [key for key in _NEEDED if key in family.carried and config.get(key) is None]:
        yield f"its config.json has no {missing[0]}"
    if config.get("quantization_config"):
        yield "it is quantised; use the original weights, or dequantise it"


def _config(
    dense: DenseFamily, family: MoeFamily, config: Mapping[str, Any], width: int, holds: Callable[[str], bool]
) -> dict[str, Any]:
    """Write what a mixture's `config.json` says as that of a dense family."""
    biased = holds("self_attn.q_proj.bias") or holds("self_attn.o_proj.bias")
    made = {
        **{key: config.get(key) for key in NULLABLE},
        **{key: config[key] for key in (*dense.defaults, *_ALWAYS) if key in config},
        **{key: biased for key in _BIASES if key in dense.facts.values()},
        **({"mlp_bias": False} if "mlp_bias" in dense.defaults else {}),
        **_rope(dense, family, config),
        **_layers(dense, family, config),
        **{key: value for key, value in _DENSE_ALONE.items() if key in dense.defaults},
        "intermediate_size": width,
        **({dense.ffn_width: width} if isinstance(dense.ffn_width, str) else {}),
        "tie_word_embeddings": not holds("lm_head.weight") or bool(config.get("tie_word_embeddings")),
        "head_dim": config.get("head_dim")
        or config.get("attention_head_dim")
        or config["hidden_size"] // config["num_attention_heads"],
        "architectures": [f"{_CLASSES[dense.model_type]}ForCausalLM"],
        "model_type": dense.model_type,
    }
    dtype = config.get("torch_dtype", config.get("dtype"))
    made |= {"torch_dtype": dtype, "dtype": dtype} if dtype else {}
    return dict(sorted(made.items()))


def _rope(dense: DenseFamily, family: MoeFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write rotary settings as all versions of transformers read them."""
    given = config.get("rope_parameters")
    part = _setting(family, config, "partial_rotary_factor")
    if dense.rope == "verbatim":
        return {"rope_parameters": given} | ({} if part is None else {"partial_rotary_factor": part})
    if isinstance(given, dict) and given and all(isinstance(value, dict) for value in given.values()):
        kinds = list(given.values())  # one setting for each kind of layer
        if any(kind != kinds[0] for kind in kinds):
            return {"rope_parameters": given}
        return _rope(dense, family, {**config, **_flat(kinds[0])})
    theta, scaling = config.get("rope_theta"), config.get("rope_scaling")
    partly = {"partial_rotary_factor": part} if part not in {None, 1.0} else {}
    rope = {"rope_theta": theta, **(scaling or {"rope_type": "default"}), **partly}
    found = {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": rope, **partly}
    if dense.model_type == "olmo2" and scaling:  # transformers 4.57 takes these two keys alone
        found["rope_scaling"] = {"type": scaling.get("rope_type"), "factor": scaling.get("factor")}
    if original := config.get("original_max_position_embeddings"):
        found["original_max_position_embeddings"] = original
    return found


def _flat(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of one kind of layer, as keys of `config.json`."""
    scaling = {key: value for key, value in rope.items() if key not in {"rope_theta", "partial_rotary_factor"}}
    return {
        "rope_parameters": dict(rope),
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }


def _kinds(family: MoeFamily, config: Mapping[str, Any]) -> list[str]:
    """Whether each layer of a mixture with attention alone has a window; one as long as the context is none."""
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    given = config.get("layer_types")
    if given is None:
        off = not window or config.get("use_sliding_window") is False
        first = config.get("max_window_layers", 0) if "use_sliding_window" in config else 0
        given = [FULL if off or layer < first else SLIDING for layer in range(layers)]
    long = not window or window >= config["max_position_embeddings"]
    spelled = {released: kind for kind, released in family.kinds.items()}
    return [FULL if long and kind == SLIDING else spelled.get(kind, kind) for kind in given]


def _layers(dense: DenseFamily, family: MoeFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write which layers have a window, and which rotate."""
    if dense.model_type in _SAME_LAYERS:
        return {}
    kinds = _kinds(family, config)
    window = config.get("sliding_window") if SLIDING in kinds else None
    found = {"sliding_window": window} if "sliding_window" in dense.defaults else {}
    if "use_sliding_window" in dense.defaults:
        found["use_sliding_window"] = window is not None
    if "layer_types" in dense.defaults:  # transformers 4.57 reads none in a Mistral, and does not know Ministral
        found["layer_types"] = None if dense.model_type == "mistral" else kinds
    if dense.model_type == "smollm3":
        found["no_rope_layers"] = [int(bool(theta)) for theta in config.get("layer_rope_theta") or []] or None
    return found


def _differences(family: MoeFamily, config: Mapping[str, Any], model: DenseModel) -> Iterator[str]:
    """Say what the dense model computes otherwise than the mixture, among what their configs say."""
    values = model.values
    for key, name in family.named.items():
        if name in _MULTIPLIERS or name in _COMPARED:
            found = config.get(key, _MULTIPLIERS.get(name, values[name] if name == "head_dim" else None))
            if isinstance(found, list):
                found = [family.kinds.get(kind, kind) for kind in found]
            if not _same(found, values[name]):
                yield f"its {key} is {found!r:.60}, not {values[name]!r:.60}"
        elif name == "max_position_embeddings" and (config.get(key) or 0) < values[name]:
            yield f"its {key} is {config.get(key)!r:.40}, shorter than the context"
    if model.family.model_type not in _SAME_LAYERS:
        window = model.config.get("sliding_window")
        ours = [(kind, kind == SLIDING and config.get("sliding_window")) for kind in _kinds(family, config)]
        theirs = [(kind, kind == SLIDING and window) for kind in model.layer_types]
        if "all_sliding" not in family.named.values() and ours != _shortened(theirs, model):
            yield "its layers have other windows"


def _shortened(kinds: list[tuple[str, Any]], model: DenseModel) -> list[tuple[str, Any]]:
    context = model.config["max_position_embeddings"]
    return [(FULL, False) if kind == SLIDING and window >= context else (kind, window) for kind, window in kinds]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return math.isclose(found, expected)
    return bool(found == expected)
