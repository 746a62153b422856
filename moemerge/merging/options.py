"""What a merge can be asked for beside its plan and where it goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["routers", "weights"]
Progress = Callable[[Stage, int, int], None]
"""Called with the stage, what is done and all there is: layers for routers, bytes for weights.

Weights are written while routers are computed: reports of the two stages alternate, from one thread at a time.
"""


@dataclass(frozen=True)
class MergeOptions:
    """Options of `merge`, wherever it goes."""

    overwrite: bool = False
    """Replace the model that is there."""
    resume: bool = False
    """Keep the complete shards of the same merge, cut off before; without any, begin."""
    low_memory: bool = False
    """One copying thread, small chunks, and neither sources nor output left in the page cache."""
    seed: int = 0
    """Seed of random routers and of `noise_scale`."""
    device: str = "auto"
    """Where the base model's layers are run for the routers: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    base_bits: Literal[4, 8] | None = None
    """Hold the base model's Linear weights in so many bits for the routers, by bitsandbytes."""
    licence: str | None = None
    """Licence of the merged model, for its card; else what the cards of its sources agree on, if they do."""
