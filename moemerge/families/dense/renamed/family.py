"""The description of a model type whose checkpoints hold a known dense model under other names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moemerge.families.dense.family import Config, nothing_more

Rows = Sequence[tuple[int, int]]
"""Runs of rows, each as its first row and the number of rows."""
Sizes = Mapping[str, int]
"""Lengths of axes by name; see `DenseModel.sizes`."""
Fused = Callable[[Sizes], Mapping[str, Rows]]
"""A function from a model's sizes to the rows of a fused tensor that each of its parts is made of."""
Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741  as the projections are called


@dataclass(frozen=True)
class Renamed:
    """A model type as data: what its `config.json` and its tensors are called in a dense family that is known.

    Modules are named without the `weight` or `bias` at the end of a tensor's name.
    """

    model_type: str
    plain: str
    """The `model_type` that it is read as."""
    defaults: Mapping[str, Any]
    """The meaning of absent keys in the released code, where it differs from that of `plain`."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of `config.json` with other names than in `plain`."""
    values: Callable[[Config], Mapping[str, Any]] = nothing_more
    """Keys of `plain` that are computed from the released ones."""
    silent: tuple[str, ...] = ()
    """Keys that `values` reads, and those with which the released code computes nothing that matters here."""
    refusals: Callable[[Config], str] = lambda _config: ""
    """Why a model of this type cannot be read; empty where it can."""
    layers: str = "model.layers."
    """What stands before the number of a layer."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Modules of a layer with other names than in `plain`."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Modules of a layer that are several in `plain`."""
    outside: Mapping[str, str] = field(default_factory=dict)
    """Modules outside the layers with other names than in `plain`."""
    further: str = ""
    """The beginning of the names of tensors that predict further tokens; they are left out."""
    buffers: tuple[str, ...] = ()
    """Name endings of buffers that every reader computes itself."""
    unit_head: Callable[[Config], bool] = lambda _config: False
    """Whether each row of the head is divided by its length."""
    notes: Callable[[Config], Sequence[str]] = lambda _config: ()
    """Notes on where the released code computes something else."""


def one_after_another(sizes: Sizes) -> dict[str, Rows]:
    """Queries, then keys, then values."""
    query, key = sizes["query"], sizes["key"]
    return {Q: [(0, query)], K: [(query, key)], V: [(query + key, key)]}


def by_key_head(sizes: Sizes) -> dict[str, Rows]:
    """For each key head in turn, the heads of its queries, the key head, its value head."""
    head, groups = sizes["head"], sizes["key"] // sizes["head"]
    queries = sizes["query"] // groups
    starts = [group * (queries + 2 * head) for group in range(groups)]
    return {
        Q: [(start, queries) for start in starts],
        K: [(start + queries, head) for start in starts],
        V: [(start + queries + head, head) for start in starts],
    }
