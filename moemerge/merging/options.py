"""The options of a merge that belong neither to its plan nor to its destination."""

from collections.abc import Callable
from dataclasses import dataclass

from moemerge.routers.request import PassOptions

Stage = str
"""`shared weights`, `routers`, `weights`, or `NAME writes tokens` for an expert that writes text for the routers."""
Progress = Callable[[Stage, int, int], None]
"""A function that is called with the stage, the amount done and the total.

They are bytes for weights, tokens of each sequence for an expert that writes, layers for other stages.

Weights are written while routers are computed: reports of the two stages alternate, from one thread at a time.
"""


@dataclass(frozen=True)
class MergeOptions(PassOptions):
    """Options of `merge` for any destination, and how models are run: to make routers and choose shared weights."""

    overwrite: bool = False
    """Whether to replace a model that is there."""
    resume: bool = False
    """Whether to keep the complete shards that a cut-off run of the same merge has left; without any, start anew."""
    seed: int = 0
    """Seed of random routers and of `noise_scale`."""
    licence: str | None = None
    """Licence of the merged model, for its card; None for the one that its sources' cards agree on, if they do."""
