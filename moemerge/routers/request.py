"""The request for a merge's routers: the mixture, and the models that they are made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moemerge.config.schema import MergeConfig
from moemerge.dtypes import ComputeDtype, DType
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
    expert_folders: tuple[tuple[Path, ...], ...]
    """Of each routed expert, the folder of its small files and those of its adapters."""
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


@dataclass(frozen=True)
class PassOptions:
    """How models are run for the routers; a merge copies weights by `low_memory`, too."""

    device: str = "auto"
    """Device that runs models: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    compute_dtype: ComputeDtype = "auto"
    """What models are run in: `float32`, `bfloat16`, or `auto`, which is the faster one on a CPU."""
    ray: str | None = None
    """Address of a Ray cluster whose processes run the base model for the routers, `local` to begin some; None for this
    process alone."""
    workers: int | None = None
    """How many processes; None for as many as there are GPUs, or CPUs."""
    base_bits: Literal[4, 8] | None = None
    """Bits of the base model's Linear weights while it runs for the routers, by bitsandbytes; None for all of them."""
    low_memory: bool = False
    """Whether to read no weights ahead, to copy with one thread in small chunks, and to leave neither sources nor
    output in the page cache."""
    kept_states: Path | None = None
    """Folder that keeps the base model's router inputs from one merge to the next."""
    kept_fits: Path | None = None
    """Folder that keeps rows that were fitted to labelled tokens, before they are scaled."""
    reported: bool = True
    """Whether to measure what routers do with the prompts; without it, their report has no layers."""
