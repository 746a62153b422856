"""The request for a merge's routers: the mixture, and the models that they are made from."""

from dataclasses import dataclass
from pathlib import Path

from moemerge.config.schema import MergeConfig
from moemerge.dtypes import DType
from moemerge.families.dense import ModelTensors
from moemerge.families.family import Scoring
from moemerge.families.mixture_shape import Mixture


@dataclass(frozen=True)
class RouterRequest:
    """A mixture that needs routers, and the models that they are made from."""

    config: MergeConfig
    folder: Path
    """The base model's folder."""
    base: ModelTensors
    """The base model, with the tensors that the mixture takes from it."""
    experts: tuple[ModelTensors, ...]
    """Config and tensors of each routed expert, for methods that read their weights."""
    mixture: Mixture
    """The mixture: the layers that have routers, and the experts in them."""
    scoring: Scoring
    """How the output family's routers turn logits into weights."""
    dtype: DType
    """Dtype of the merged model, in which routers are stored and judged."""
    shared_gate: bool
    """Whether the shared experts have a gate that is made from their prompts."""
    chat_prompts: bool
    """Whether plain prompts are put into the base model's chat template."""
    runs_base: bool
    """Whether the base model reads the prompts, for the routers or for the routing table."""
