"""A dense model as its `config.json` describes it, every silent default made explicit.

Checked against the configuration classes of `transformers` 4.57.6 and 5.23.0, whose defaults differ from each other and
from those of the MoE families: an omitted key must be resolved before it is copied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any, Final

from moemerge.formats.dense.family import FULL, SLIDING, Axes, DenseFamily
from moemerge.formats.dense.tables import DENSE_FAMILIES, NOT_MERGED

_REQUIRED: Final = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Far above any model; a hostile number would fill the memory with tensor names.
_MAX_SIZE: Final = {"num_hidden_layers": 10_000}
_NUMBER: Final = (float, int)
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "max_position_embeddings": (int,), "rms_norm_eps": _NUMBER, "norm_eps": _NUMBER, "layer_norm_eps": _NUMBER,
    "rope_theta": _NUMBER, "initializer_range": (*_NUMBER, NoneType), "attention_dropout": _NUMBER,
    "tie_word_embeddings": (bool,), "attention_bias": (bool,), "attention_out_bias": (bool,), "use_bias": (bool,),
    "mlp_bias": (bool,), "use_qk_norm": (bool,), "hidden_act": (str,), "hidden_activation": (str,),
    "head_dim": (int, NoneType), "num_key_value_heads": (int, NoneType), "sliding_window": (int, NoneType),
    "use_sliding_window": (bool,), "max_window_layers": (int,), "layer_types": (list, NoneType),
    "no_rope_layers": (list, NoneType), "layer_rope_theta": (list, NoneType), "partial_rotary_factor": _NUMBER,
    "attention_multiplier": (*_NUMBER, NoneType), "embedding_multiplier": _NUMBER, "residual_multiplier": _NUMBER,
    "logits_scaling": _NUMBER, "logit_scale": _NUMBER,
}  # fmt: skip
_ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_OWN_SCALES: Final = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class DenseModel:
    """What a dense model's `config.json` says, every silent default made explicit."""

    family: DenseFamily
    config: dict[str, Any]
    """Keys of `config.json` and defaults; `rope_theta` and `rope_scaling` in place of every other rope spelling."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def hidden_act(self) -> str:
        """The FFN's activation."""
        return str(self.config.get("hidden_act") or self.config.get("hidden_activation") or "silu")

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Length of each named axis of the family's tensors."""
        config, width = self.config, self.family.ffn_width
        query, key = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
        return {
            "vocab": config["vocab_size"],
            "hidden": config["hidden_size"],
            "ffn": width(config) if callable(width) else config[width],
            "query": query,
            "key": key,
            "qkv": query + 2 * key,
            "head": config["head_dim"],
            "heads": config["num_attention_heads"],
            **self.family.sizes(config),
        }

    @cached_property
    def layer_types(self) -> list[str]:
        """Of each layer, what it does beside its FFN."""
        given = self.config.get("layer_types") or self.config.get("layers_block_type")
        return [self.family.kinds.get(kind, kind) for kind in given or self.family.layer_types(self.config)]

    @cached_property
    def facts(self) -> frozenset[str]:
        """Those of `PLAIN` that hold, and `mlp_bias`, `tied`."""
        config = self.config
        said = {fact: self.values.get(key) if isinstance(key, str) else key for fact, key in self.family.facts.items()}
        window = config.get("sliding_window") is not None and SLIDING in self.layer_types
        said |= {
            "partial_rotary": config.get("partial_rotary_factor", 1.0) != 1.0,
            "multipliers": not self.has_plain_scales,
            "nope": 0 in (self.values["layer_rope_theta"] or ()),
            "window": window,
            "mixed_attention": len(set(self.layer_types)) > 1,
            "wide_heads": config["head_dim"] * config["num_attention_heads"] != config["hidden_size"],
            "scaled_rope": bool(config.get("rope_scaling")),
            "tied": config["tie_word_embeddings"],
        }
        return frozenset(fact for fact, holds in said.items() if holds)

    @cached_property
    def values(self) -> dict[str, Any]:
        """`config`, with what output families say in words of their own."""
        config, layers = self.config, self.layers
        rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {"rope_type": "default"})}
        rotary_part = config.get("partial_rotary_factor", 1.0)
        with_part = rope | {"partial_rotary_factor": rotary_part}
        window = config.get("sliding_window") if SLIDING in self.layer_types else None
        return {
            **dict.fromkeys(_OWN_SCALES, 1.0),
            "rope_parameters": rope,
            "layer_rope_theta": [config.get("rope_theta")] * layers,
            **config,
            "layers": layers,
            "hidden_act": self.hidden_act,
            "attention_multiplier": self.attention_multiplier,
            "layer_types": self.layer_types,
            "granite_kinds": ["mamba" if kind == "mamba" else "attention" for kind in self.layer_types],
            "all_sliding": [SLIDING] * layers,
            "window": window,
            "window_switch": window is not None,
            "some_window": window or config["max_position_embeddings"],
            "rotary_part": rotary_part,
            "rope_with_part": with_part,
            "rope_by_kind": {FULL: rope, SLIDING: rope},
            "rope_by_kind_with_part": {FULL: with_part, SLIDING: with_part},
            **self.family.values(config),
        }

    @property
    def attention_multiplier(self) -> float:
        """Factor on the products of queries and keys."""
        given = self.config.get("attention_multiplier")
        return self.config["head_dim"] ** -0.5 if given is None else float(given)

    @property
    def has_plain_scales(self) -> bool:
        """Whether nothing is scaled that a Llama leaves alone."""
        own = all(self.config.get(key, 1.0) == 1.0 for key in _OWN_SCALES)
        return own and math.isclose(self.attention_multiplier, self.config["head_dim"] ** -0.5)

    @property
    def class_keys(self) -> dict[str, Any]:
        """What the family's class is told: no key that it does not read."""
        keys = (*_REQUIRED, *self.family.defaults, "head_dim", "rope_scaling", "no_rope_layers")
        told = {
            key: self.config[key]
            for key in keys
            if key in self.config and (self.config[key] is not None or self.family.defaults.get(key, 0) is not None)
        }
        return told | ({"layer_types": self.layer_types} if self.config.get("layer_types") else {})

    def tensors(self, layer: int) -> dict[str, Axes]:
        """Names and axes of a layer's tensors beside its FFN."""
        holds = {*self.facts, self.layer_types[layer]}
        prefix = f"model.layers.{layer}."
        return {prefix + row.name: row.axes for row in self.family.rows if holds.issuperset(row.when)}

    def ffn(self, layer: int) -> dict[str, Axes]:
        """Names and axes of the tensors of a layer's FFN."""
        named: dict[str, Axes] = {}
        for role, half in self.family.ffn.items():
            width = "ffn" if half.parts == 1 else f"{half.parts} ffn"
            named[f"model.layers.{layer}.{half.name}"] = ("hidden", width) if role == "down" else (width, "hidden")
        return named

    def outside(self) -> dict[str, Axes]:
        """Names and axes of the tensors outside the layers, beside the head."""
        return {**self.family.first, self.family.last: ("hidden",)}

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """Sizes of the named axes; an axis `2 ffn` is twice as long as `ffn`."""
        return tuple(self._size(axis) for axis in axes)

    def _size(self, axis: str) -> int:
        factor, _, name = axis.rpartition(" ")
        return int(factor or 1) * (int(name) if name.isdigit() else self.sizes[name])


def read_dense(config: Mapping[str, Any]) -> DenseModel | str:
    """Interpret a `config.json`; a text says why it cannot be."""
    model_type = config.get("model_type")
    family = DENSE_FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        if isinstance(model_type, str) and model_type in NOT_MERGED:
            return f"its model_type is {model_type!r}, which no output family repeats exactly: {NOT_MERGED[model_type]}"
        known = ", ".join(DENSE_FAMILIES)
        return f"its model_type is {model_type!r}; moemerge reads dense models of type {known}"
    full = _read_values(family, config)
    if isinstance(full, str):
        return full
    unproved = [
        f"{key} is {full[key]!r}: {reason}" for key, (value, reason) in family.refusals.items() if full[key] != value
    ]
    if unproved:
        return "; ".join(unproved)
    model = DenseModel(family, full)
    if len(model.layer_types) != model.layers:
        return f"its config.json names the types of {len(model.layer_types)} layers, but has {model.layers}"
    return model


def _read_values(family: DenseFamily, config: Mapping[str, Any]) -> dict[str, Any] | str:
    """Every key of `config.json` and the family's defaults, checked; a text says what is wrong with them."""
    # A null says as little as an absent key, except where it has a meaning of its own.
    given = {
        key: value for key, value in config.items() if value is not None or NoneType in _TYPES.get(key, (NoneType,))
    }
    full = {**family.defaults, **given}
    wrong = [
        key for key in _REQUIRED
        if type(full.get(key)) is not int or not 0 < full[key] <= _MAX_SIZE.get(key, 10**9)
    ]  # fmt: skip
    if wrong:
        return f"its config.json needs a positive whole number for {', '.join(wrong)}"
    wrong = [
        f"{key} {full[key]!r:.40}" for key, types in _TYPES.items() if key in full and type(full[key]) not in types
    ]
    if wrong:
        return f"its config.json has values of the wrong type: {', '.join(wrong)}"
    full["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    full["head_dim"] = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    if family.rope == "verbatim":
        return full
    rope = _read_rope(full)
    if isinstance(rope, str):
        return rope
    full.pop("rope_parameters", None)
    return full | rope


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any] | str:
    """One spelling for rotary settings, read as transformers 5 reads them (`convert_rope_params_to_dict`)."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        return f"its rope settings differ between layers or cannot be read: {settings!r:.80}"
    settings = dict(settings)
    theta = settings.pop("rope_theta", config["rope_theta"])
    partial = settings.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    if kind not in _ROPE_TYPES:
        return f"its rope type is {kind!r}; known: {', '.join(_ROPE_TYPES)}"
    read = {"rope_theta": theta, "rope_scaling": None, "partial_rotary_factor": partial}
    if kind == "default":
        return read
    if config.get("original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return read | {"rope_scaling": {"rope_type": kind, **settings}}
