"""The options of a merge that belong neither to its plan nor to its destination."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moemerge.dtypes import ComputeDtype

Stage = str
"""`shared weights`, `routers`, `weights`, or `NAME writes tokens` for an expert that writes text for the routers."""
Progress = Callable[[Stage, int, int], None]
"""A function that is called with the stage, the amount done and the total.

They are bytes for weights, tokens of each sequence for an expert that writes, layers for other stages.

Weights are written while routers are computed: reports of the two stages alternate, from one thread at a time.
"""


@dataclass(frozen=True)
class MergeOptions:
    """Options of `merge` for any destination."""

    overwrite: bool = False
    """Whether to replace a model that is there."""
    resume: bool = False
    """Whether to keep the complete shards that a cut-off run of the same merge has left; without any, start anew."""
    low_memory: bool = False
    """Whether to use one copying thread and small chunks, and to leave neither sources nor output in the page cache."""
    seed: int = 0
    """Seed of random routers and of `noise_scale`."""
    device: str = "auto"
    """Device that runs models, to make routers and choose shared weights: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    compute_dtype: ComputeDtype = "auto"
    """What models are run in: `float32`, `bfloat16`, or `auto`, which is the faster one on a CPU."""
    base_bits: Literal[4, 8] | None = None
    """Bits of the base model's Linear weights while it runs for the routers, by bitsandbytes; None for all of them."""
    kept_states: Path | None = None
    """Folder that keeps the base model's router inputs from one merge to the next."""
    licence: str | None = None
    """Licence of the merged model, for its card; None for the one that its sources' cards agree on, if they do."""
