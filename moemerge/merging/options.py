"""The options of a merge that belong neither to its plan nor to its destination."""

from dataclasses import dataclass

from moemerge.routers.request import PassOptions


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
