"""Dense model families that can be merged: their tensors, and what their `config.json` means where it is silent.

Checked against the `transformers` classes LlamaConfig and MistralConfig of 4.57.6 and 5.23.0, whose defaults differ
from each other and from those of the MoE families: an omitted key must be resolved before it is copied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final

Shape = tuple[str, ...]
"""Axes by name: see `DenseModel.sizes`."""


@dataclass(frozen=True)
class DenseFamily:
    """A dense decoder family as data; tensor names hold `{layer}`."""

    model_type: str
    outside: Mapping[str, Shape]
    """Tensors outside the layers."""
    head: str
    """The language-model head, absent where embeddings are tied."""
    embeddings: str
    shared: Mapping[str, Shape]
    """Tensors of a layer beside its FFN."""
    ffn: Mapping[str, tuple[str, Shape]]
    """Role (`gate`, `up`, `down`) to name and shape."""
    ffn_module: str
    """Module of a layer whose input is the router input."""
    derived: tuple[str, ...]
    """Endings of buffers that old checkpoints hold and every reader computes itself."""
    required: tuple[str, ...]
    """Keys without which `config.json` means nothing."""
    defaults: Mapping[str, Any]
    """What an absent key of `config.json` means."""


# Far above any model; a hostile number would fill the memory with tensor names.
_MAX_SIZE: Final = {"num_hidden_layers": 10_000}
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "max_position_embeddings": (int,), "rms_norm_eps": (float, int), "rope_theta": (float, int),
    "initializer_range": (float, int), "attention_dropout": (float, int), "tie_word_embeddings": (bool,),
    "attention_bias": (bool,), "mlp_bias": (bool,), "hidden_act": (str,), "head_dim": (int, NoneType),
    "num_key_value_heads": (int, NoneType), "sliding_window": (int, NoneType), "layer_types": (list, NoneType),
}  # fmt: skip
_ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_LAYER: Final = "model.layers.{layer}."
_LLAMA_LIKE: Final[dict[str, Any]] = {
    "outside": {"model.embed_tokens.weight": ("vocab", "hidden"), "model.norm.weight": ("hidden",)},
    "head": "lm_head.weight",
    "embeddings": "model.embed_tokens.weight",
    "shared": {
        _LAYER + "input_layernorm.weight": ("hidden",),
        _LAYER + "self_attn.q_proj.weight": ("query", "hidden"),
        _LAYER + "self_attn.k_proj.weight": ("key", "hidden"),
        _LAYER + "self_attn.v_proj.weight": ("key", "hidden"),
        _LAYER + "self_attn.o_proj.weight": ("hidden", "query"),
        _LAYER + "post_attention_layernorm.weight": ("hidden",),
    },
    "ffn": {
        "gate": (_LAYER + "mlp.gate_proj.weight", ("ffn", "hidden")),
        "up": (_LAYER + "mlp.up_proj.weight", ("ffn", "hidden")),
        "down": (_LAYER + "mlp.down_proj.weight", ("hidden", "ffn")),
    },
    "ffn_module": "mlp",
    "derived": ("rotary_emb.inv_freq",),
    "required": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
}
_LLAMA_LIKE_DEFAULTS: Final[dict[str, Any]] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
}  # fmt: skip

LLAMA: Final = DenseFamily(
    model_type="llama",
    **_LLAMA_LIKE,
    defaults=_LLAMA_LIKE_DEFAULTS | {"max_position_embeddings": 2048, "num_key_value_heads": None},
)
MISTRAL: Final = DenseFamily(
    model_type="mistral",
    **_LLAMA_LIKE,
    defaults=_LLAMA_LIKE_DEFAULTS
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
DENSE_FAMILIES: Final = {family.model_type: family for family in (LLAMA, MISTRAL)}


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
    def sizes(self) -> dict[str, int]:
        """Length of each named axis of the family's tensors."""
        heads, key_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        return {
            "vocab": self.config["vocab_size"],
            "hidden": self.config["hidden_size"],
            "ffn": self.config["intermediate_size"],
            "query": heads * self.config["head_dim"],
            "key": key_heads * self.config["head_dim"],
        }

    def shape(self, axes: Shape) -> tuple[int, ...]:
        """Sizes of the named axes."""
        sizes = self.sizes
        return tuple(sizes[axis] for axis in axes)


def read_dense(config: Mapping[str, Any]) -> DenseModel | str:
    """Interpret a `config.json`; a text says why it cannot be."""
    model_type = config.get("model_type")
    family = DENSE_FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(DENSE_FAMILIES)
        return f"its model_type is {model_type!r}; moemerge reads dense models of type {known}"
    wrong = [
        key for key in family.required
        if type(config.get(key)) is not int or not 0 < config[key] <= _MAX_SIZE.get(key, 10**9)
    ]  # fmt: skip
    if wrong:
        return f"its config.json needs a positive whole number for {', '.join(wrong)}"
    # A null says as little as an absent key, except where it has a meaning of its own.
    given = {
        key: value for key, value in config.items() if value is not None or NoneType in _TYPES.get(key, (NoneType,))
    }
    full = {**family.defaults, **given}
    wrong = [
        f"{key} {full[key]!r:.40}" for key, types in _TYPES.items() if type(full.get(key, types[0]())) not in types
    ]
    if wrong:
        return f"its config.json has values of the wrong type: {', '.join(wrong)}"
    full["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    full["head_dim"] = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    rope = _read_rope(full)
    if isinstance(rope, str):
        return rope
    full.pop("rope_parameters", None)
    return DenseModel(family, full | rope)


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any] | str:
    """One spelling for rotary settings, read as transformers 5 reads them (`convert_rope_params_to_dict`)."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        return f"its rope settings differ between layers or cannot be read: {settings!r:.80}"
    settings = dict(settings)
    theta = settings.pop("rope_theta", config["rope_theta"])
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    if kind not in _ROPE_TYPES:
        return f"its rope type is {kind!r}; known: {', '.join(_ROPE_TYPES)}"
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if config.get("original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **settings}}
