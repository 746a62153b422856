"""The description of a dense family: its tensors, and what it computes beside its FFNs, in facts that all share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Axes = tuple[str, ...]
"""Axes of a tensor by name; `DenseModel.sizes` has their lengths."""
Role = Literal["gate", "up", "down"]
ROLES: Final[tuple[Role, ...]] = ("gate", "up", "down")
"""The projections of an FFN."""
Config = Mapping[str, Any]

BEFORE: Final = "normalises what its FFNs take"
FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
WIDE: Final = "wide_ffn"

NON_LLAMA_FACTS: Final[dict[str, str]] = {
    "qk_norm": "norms of queries and keys",
    "qkv_bias": "biases of queries, keys and values",
    "output_bias": "biases of the attention's output",
    "partial_rotary": "heads that are rotated in part",
    "multipliers": "scales of attention, embeddings, residuals or logits",
    "sinks": "attention sinks",
    "nope": "layers without positions",
    "window": "sliding window",
    "mixed_attention": "layers that attend differently",
    "wide_heads": "head_dim of its own",
    "scaled_rope": "scaled rotary positions",
    "layer_inputs": "embeddings for each layer",
    "shared_keys": "layers that share keys and values",
    "wide_ffns": "FFNs of two widths",
}
"""Facts that are false of a plain Llama, each with the words for it in messages."""
ROPES: Final[dict[str, str]] = {
    "linear": "linearly scaled rotary positions",
    "dynamic": "rotary positions scaled by the length",
    "yarn": "yarn's rotary positions",
    "longrope": "longrope's rotary positions",
    "llama3": "llama3's rotary positions",
}
"""Rope types other than the default, which are facts too, each with the words for it in messages."""


@dataclass(frozen=True)
class LayerTensor:
    """A tensor of a layer, named within the layer; the layer has it where all of `when` holds."""

    name: str
    axes: Axes
    when: tuple[str, ...] = ()
    """Facts of the model or the layer, or the layer's type."""
    lingers: bool = False
    """Whether released files hold it in every layer, also where nothing reads it."""


@dataclass(frozen=True)
class FfnProjection:
    """The tensor that holds one projection of an FFN, alone or as one of `parts` equal runs of rows."""

    name: str
    part: int = 0
    parts: int = 1


def all_full(config: Config) -> list[str]:
    """Give every layer the type that attends to everything."""
    return [FULL] * int(config["num_hidden_layers"])


def nothing_more(_config: Config) -> dict[str, Any]:
    """Return nothing: the default of families without peculiarities."""
    return {}


def no_facts(_config: Config, _layer: int) -> frozenset[str]:
    """Return nothing: the default of families whose layers differ in their types alone."""
    return frozenset()


SEPARATE: Final[dict[Role, FfnProjection]] = {
    "gate": FfnProjection("mlp.gate_proj.weight"),
    "up": FfnProjection("mlp.up_proj.weight"),
    "down": FfnProjection("mlp.down_proj.weight"),
}


@dataclass(frozen=True)
class DenseFamily:
    """A dense decoder family as data."""

    model_type: str
    tensors: tuple[LayerTensor, ...]
    """Tensors of a layer beside its FFN."""
    defaults: dict[str, Any]
    """The meaning of absent keys in `config.json`, for every key that the family's class reads."""
    facts: dict[str, str | bool] = field(default_factory=dict)
    """Names of `NON_LLAMA_FACTS`, the multipliers and `mlp_bias`: the key for each, or whether it always holds."""
    block: str = "llama"
    """Families of one block compute alike but for their facts."""
    interleaved: bool = False
    """Whether rotary positions turn neighbouring elements, and not the two halves of a head."""
    ffn: Mapping[Role, FfnProjection] = field(default_factory=lambda: SEPARATE)
    ffn_module: str = "mlp"
    """Module of a layer whose input is the router input."""
    ffn_norm: str | None = "post_attention_layernorm.weight"
    """The norm whose output is the router input; None where the FFN's input is not normalised."""
    norm_offset: float = 0.0
    """The number that every norm adds to its weights, but for those of families whose mixtures do the same."""
    around_ffn: str = BEFORE
    """What stands between an FFN and the residual stream, in words that follow the model's type; see `ffn_place`."""
    ffn_width: str | Callable[[Config], int] = "intermediate_size"
    first: dict[str, Axes] = field(default_factory=lambda: {"model.embed_tokens.weight": ("vocab", "hidden")})
    """Tensors before the layers, the embeddings first."""
    first_if: Mapping[str, Mapping[str, Axes]] = field(default_factory=dict)
    """Further tensors before the layers, under the fact of the model with which they are there."""
    last: str = "model.norm.weight"
    head: str = "lm_head.weight"
    """The language-model head, absent where embeddings are tied."""
    splits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Tensors of a layer that every output family holds in parts: names of the parts, and each one's axis of rows."""
    layer_types: Callable[[Config], list[str]] = all_full
    """The type of each layer where `config.json` names none."""
    layer_facts: Callable[[Config, int], frozenset[str]] = no_facts
    """Facts of a layer beside its type; with `WIDE` its FFN is twice as wide as others."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Layer types that transformers 5 spells differently from released files, with their spelling there."""
    sizes: Callable[[Config], Mapping[str, int]] = nothing_more
    """Lengths of axes that only this family has."""
    values: Callable[[Config], Mapping[str, Any]] = nothing_more
    """Values of keys that only this family has, under the names that output families use."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of keys, which the family's class reads too."""
    activations: Mapping[str, str] = field(default_factory=dict)
    """Activations that the family's class takes for others."""
    head_dim: str = "head_dim"
    """The key for the width of a head."""
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of rope types, which the family's class reads too."""
    rope: Literal["read", "verbatim"] = "read"
    """Whether rope settings are understood, or copied as they are to an output family that has the same."""
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Name endings of buffers that old checkpoints hold and every reader computes itself."""
    notes: tuple[tuple[str, str], ...] = ()
    """Notes on a merge of this family, each with the fact under which it holds, or an empty text for always.

    `{family}` stands for the output family, `{original}` for `original_max_position_embeddings`.
    """
    refusals: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Keys with the only value under which the family was tested, and the reason."""

    @property
    def ffn_place(self) -> str:
        """What stands between an FFN and the residual stream, in words that follow the model's type.

        FFNs of families with the same words can take each other's place: each takes what a norm gives, and what it
        gives is added to the stream. A factor on that is `residual_multiplier`.
        """
        offset = f", by norms that add {self.norm_offset:g} to their weights" if self.norm_offset else ""
        return f"{self.around_ffn}{offset}"

    @property
    def embeddings(self) -> str:
        """Name of the token embeddings."""
        return next(iter(self.first))
