"""What a plan asks of its routers."""

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
    """The base model's."""
    base: DenseModel
    tensors: Mapping[str, TensorInfo]
    """The base model's."""
    experts: tuple[tuple[DenseModel, Mapping[str, TensorInfo]], ...]
    """The models whose FFNs are chosen between, for methods that read their weights."""
    mixture: Mixture
    """Which layers have routers, and which experts take part in them."""
    scoring: Scoring
    """How the output family's routers make weights of their logits."""
    dtype: str
    """Of the merged model; routers are judged as they will be stored."""
    shared_gate: bool
    """Whether the shared experts have a gate that is made from their prompts."""
    chat_prompts: bool
    """Whether plain prompts are put into the base model's chat template."""
    runs_base: bool
    """Whether the base model reads the prompts, for the routers or for the table of what they do."""
