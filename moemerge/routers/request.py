"""The request for a merge's routers: the mixture, and the models that they are made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import MergeConfig
from moemerge.families.dense import DenseModel
from moemerge.families.family import Scoring
from moemerge.families.mixture import Mixture


@dataclass(frozen=True)
class RouterRequest:
    """A mixture that needs routers, and the models that they are made from."""

    config: MergeConfig
    folder: Path
    """The base model's folder."""
    base: DenseModel
    tensors: Mapping[str, TensorInfo]
    """The base model's tensors by name."""
    experts: tuple[tuple[DenseModel, Mapping[str, TensorInfo]], ...]
    """Config and tensors of each routed expert, for methods that read their weights."""
    mixture: Mixture
    """The mixture: the layers that have routers, and the experts in them."""
    scoring: Scoring
    """How the output family's routers turn logits into weights."""
    dtype: str
    """Dtype of the merged model, in which routers are stored and judged."""
    shared_gate: bool
    """Whether the shared experts have a gate that is made from their prompts."""
    runs_base: bool
    """Whether the base model reads the prompts, for the routers or for the routing table."""
