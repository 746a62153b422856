"""A dense model as its `config.json` describes it, with every silent default made explicit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NoReturn, TypeVar

from moemerge.families.dense.config_checks import UnreadableError, is_read, read_values
from moemerge.families.dense.family import FULL, ROPES, SLIDING, WIDE, Axes, DenseFamily, LayerTensor
from moemerge.families.dense.renamed.config import plain_config
from moemerge.families.dense.renamed.family import Renamed
from moemerge.families.dense.renamed.tables import RENAMED
from moemerge.families.dense.rope_settings import read_rope
from moemerge.families.dense.tables import DENSE_FAMILIES, NOT_MERGED
from moemerge.families.dense.unknown import not_read
from moemerge.families.layer_names import layer_prefix
from moemerge.families.multimodal import why_no_text

_Family = TypeVar("_Family")
# Names under which transformers' ACT2FN holds the same function.
_ACTIVATIONS: Final = {"swish": "silu", "gelu_python": "gelu"}
_EXPERT_COUNTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_OWN_SCALES: Final = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class DenseModel:
    """The contents of a dense model's `config.json`, with every silent default made explicit."""

    family: DenseFamily
    config: dict[str, Any]
    """The keys that the family's class reads, defaults included; rope settings are in one spelling."""
    unread: tuple[str, ...]
    """Keys of `config.json` that the class does not read."""
    given_rope: dict[str, Any] | None
    """The value of `rope_scaling` as `config.json` spells it."""
    quantised: str = ""
    """The method of quantisation that `config.json` names; empty for none."""
    renamed: Renamed | None = None
    """The type that its `config.json` names, if that is read as `family`."""
    released: Mapping[str, Any] = field(default_factory=dict)
    """Its `config.json` as it is, if it is renamed."""

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
        """Type of each layer beside its FFN, as transformers names it."""
        given = self.config.get("layer_types")
        return [self.family.kinds.get(kind, kind) for kind in given or self.family.layer_types(self.config)]

    @cached_property
    def facts(self) -> frozenset[str]:
        """The facts that hold: those of `NON_LLAMA_FACTS` and `ROPES`, and `mlp_bias`, `tied`."""
        config = self.config
        said = {fact: self.values.get(key) if isinstance(key, str) else key for fact, key in self.family.facts.items()}
        # A window that is no shorter than the context cuts nothing off.
        window = (config.get("sliding_window") or config["max_position_embeddings"]) < config["max_position_embeddings"]
        window = window and SLIDING in self.layer_types
        said |= {
            "partial_rotary": config.get("partial_rotary_factor", 1.0) != 1.0,
            "multipliers": not self.has_plain_scales,
            "nope": 0 in (self.values["layer_rope_theta"] or ()),
            "window": window,
            "mixed_attention": len(set(self.layer_types)) > 1,
            "wide_heads": config["head_dim"] * config["num_attention_heads"] != config["hidden_size"],
            "scaled_rope": bool(config.get("rope_scaling")),
            "tied": config["tie_word_embeddings"],
            **{kind: kind == (config.get("rope_scaling") or {}).get("rope_type") for kind in ROPES},
        }
        return frozenset(fact for fact, holds in said.items() if holds)

    @cached_property
    def values(self) -> dict[str, Any]:
        """`config`, together with the values of `DenseFamily.values`."""
        config, layers, own = self.config, self.layers, self.family.values(self.config)
        scaling = own.get("rope_scaling", config.get("rope_scaling"))
        rope = {"rope_theta": config.get("rope_theta"), **(scaling or {"rope_type": "default"})}
        rotary_part = config.get("partial_rotary_factor", 1.0)
        with_part = rope | {"partial_rotary_factor": rotary_part}
        window = config.get("sliding_window") if SLIDING in self.layer_types else None
        return {
            **dict.fromkeys(_OWN_SCALES, 1.0),
            "rope_parameters": rope,
            "layer_rope_theta": [config.get("rope_theta")] * layers,
            "positions": "rope",
            "mamba_d_head": 2 * config["hidden_size"],
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
            **own,
        }

    @property
    def attention_multiplier(self) -> float:
        """The factor on the products of queries and keys."""
        given = self.config.get("attention_multiplier")
        return self.config["head_dim"] ** -0.5 if given is None else float(given)

    @property
    def has_plain_scales(self) -> bool:
        """Whether nothing is scaled that a Llama leaves alone."""
        own = all(self.values[key] == 1.0 for key in _OWN_SCALES)
        return own and math.isclose(self.attention_multiplier, self.config["head_dim"] ** -0.5)

    @property
    def rotated_rows(self) -> int:
        """Number of elements at the beginning of each query and key head that rotate with positions."""
        width = int(self.config["head_dim"] * self.config.get("partial_rotary_factor", 1.0))
        return width + width % 2

    @property
    def class_keys(self) -> dict[str, Any]:
        """Arguments for the family's class, without keys that it does not read."""
        keys = {
            key: decoded(value)
            for key, value in self.config.items()
            if value is not None or self.family.defaults.get(key, 0) is not None
        }
        if self.given_rope:  # some classes of transformers 4 know one spelling alone
            keys["rope_scaling"] = self.given_rope
        return keys | ({"layer_types": self.layer_types} if self.config.get("layer_types") else {})

    def tensors(self, layer: int) -> dict[str, Axes]:
        """Names and axes of a layer's tensors beside its FFN."""
        prefix = layer_prefix(layer)
        return {prefix + tensor.name: tensor.axes for tensor in self.family.tensors if self._has(layer, tensor)}

    def _has(self, layer: int, tensor: LayerTensor) -> bool:
        holds = {*self.facts, self.layer_types[layer], *self.family.layer_facts(self.config, layer)}
        return holds.issuperset(tensor.when)

    @cached_property
    def unread_tensors(self) -> frozenset[str]:
        """Names of the tensors that released files hold in layers where nothing reads them."""
        lingering = [tensor for tensor in self.family.tensors if tensor.lingers]
        named = {layer_prefix(layer) + tensor.name for layer in range(self.layers) for tensor in lingering}
        return frozenset(named.difference(*map(self.tensors, range(self.layers)))) if named else frozenset()

    def ffn(self, layer: int) -> dict[str, Axes]:
        """Names and axes of the tensors of a layer's FFN."""
        named: dict[str, Axes] = {}
        for role, projection in self.family.ffn.items():
            times = projection.parts * self._times(layer)
            width = "ffn" if times == 1 else f"{times} ffn"
            axes = ("hidden", width) if role == "down" else (width, "hidden")
            named[layer_prefix(layer) + projection.name] = axes
        return named

    @cached_property
    def ffn_widths(self) -> list[int]:
        """Number of neurons in each layer's FFN."""
        return [self.sizes["ffn"] * self._times(layer) for layer in range(self.layers)]

    def _times(self, layer: int) -> int:
        return 2 if WIDE in self.family.layer_facts(self.config, layer) else 1

    @cached_property
    def first(self) -> dict[str, Axes]:
        """Names and axes of the tensors before the layers, the embeddings first."""
        held = [named for fact, named in self.family.first_if.items() if fact in self.facts]
        return {**self.family.first, **{name: axes for named in held for name, axes in named.items()}}

    def outside(self) -> dict[str, Axes]:
        """Names and axes of the tensors outside the layers, beside the head."""
        return {**self.first, self.family.last: ("hidden",)}

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """Shape of the named axes; an axis `2 ffn` is twice as long as `ffn`."""
        return tuple(self._size(axis) for axis in axes)

    def _size(self, axis: str) -> int:
        factor, _, name = axis.rpartition(" ")
        return int(factor or 1) * (int(name) if name.isdigit() else self.sizes[name])


def decoded(value: Any) -> Any:
    """Replace the objects that transformers 5 writes for numbers that JSON lacks."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return float(value["__float__"]) if isinstance(value, dict) and value.keys() == {"__float__"} else value


def read_dense(config: Mapping[str, Any]) -> DenseModel | str:
    """Interpret a `config.json`; a returned text says why it cannot be interpreted."""
    renamed = _of_type(RENAMED, config)
    try:
        plain = plain_config(renamed, config) if renamed else config
        model = _read(_of_type(DENSE_FAMILIES, plain) or _family_unknown(config), plain)
    except UnreadableError as error:
        return str(error)
    return replace(model, renamed=renamed, released=config) if renamed else model


def _of_type(families: Mapping[str, _Family], config: Mapping[str, Any]) -> _Family | None:
    model_type = config.get("model_type")
    return families.get(model_type) if isinstance(model_type, str) else None


def _family_unknown(config: Mapping[str, Any]) -> NoReturn:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in NOT_MERGED:
        raise UnreadableError(
            f"its model_type is {model_type!r}, which no output family repeats exactly: {NOT_MERGED[model_type]}"
        )
    if (inner := config.get("text_config")) and isinstance(inner, dict):
        raise UnreadableError(why_no_text(model_type, inner.get("model_type")))
    if any(type(config.get(key)) is int and config[key] > 1 for key in _EXPERT_COUNTS):
        raise UnreadableError(
            f"it is a mixture already (model_type {model_type!r}): see `moemerge edit`, or name one of its experts, as "
            "in MODEL#0 or MODEL#NAME"
        )
    raise UnreadableError(not_read(config))


def _read(family: DenseFamily, config: Mapping[str, Any]) -> DenseModel:
    spelled = {family.aliases.get(key, key): value for key, value in config.items()}
    full = read_values(family, spelled)
    spellings = {**_ACTIVATIONS, **family.activations}
    full |= {key: spellings.get(full[key], full[key]) for key in ("hidden_act", "hidden_activation") if key in full}
    if config.get("per_layer_config") and "per_layer_config" not in family.defaults:
        raise UnreadableError("its config.json has a per_layer_config, which was not proved")
    unproved = [
        f"{key} is {full[key]!r}: {reason}" for key, (value, reason) in family.refusals.items() if full[key] != value
    ]
    if unproved:
        raise UnreadableError("; ".join(unproved))
    given_rope = None
    if family.rope == "read":
        given_rope = spelled.get("rope_scaling")
        full |= read_rope(family, full)
        full.pop("rope_parameters", None)
    elif any(config.get(key) is not None for key in ("rope_theta", "rope_scaling")):
        raise UnreadableError("its rope settings stand outside rope_parameters, where this family reads them")
    unread = tuple(key for key, value in spelled.items() if value is not None and not is_read(family, key))
    model = DenseModel(family, full, unread, given_rope, _quantisation(config))
    small = [name for name, size in model.sizes.items() if type(size) is not int or size < 1]
    if small:
        raise UnreadableError(f"its config.json leaves nothing for {', '.join(small)}")
    return model


def _quantisation(config: Mapping[str, Any]) -> str:
    given = config.get("quantization_config")
    method = given.get("quant_method", "unknown") if isinstance(given, dict) else given
    return str(method)[:40] if given else ""
