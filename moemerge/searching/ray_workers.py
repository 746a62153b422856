"""Processes of a Ray cluster that try recipes beside each other, on one machine or several."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moemerge.cluster import Cluster
from moemerge.joining import ray_cluster
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.progress import Progress, Stage, Task
from moemerge.routers.initialisation import Routers
from moemerge.routers.request import PassOptions
from moemerge.searching.settings import TOGETHER
from moemerge.searching.trying import TEMPORARY, Bench, Candidate, Failure, bench, listed


class _Worker:
    """A process of the cluster, with router inputs of its own."""

    def __init__(self, compute: Compute, options: PassOptions, folder: Path) -> None:
        self._open = ExitStack()  # until the process ends
        folder.mkdir(parents=True, exist_ok=True)
        self._bench: Bench = self._open.enter_context(bench(compute, options, lambda *_: None, folder))

    def make_routers(self, candidate: Candidate) -> Routers | Failure:
        """Make the routers of one candidate."""
        return self._bench.make_routers([candidate])[0]

    def losses(self, candidates: Sequence[Candidate], windows: Sequence[Window]) -> list[list[float] | Failure]:
        """Compute the losses of some candidates."""
        return self._bench.losses(candidates, windows)

    def close(self) -> None:
        """Remove what the worker has kept."""
        self._open.close()


@dataclass
class RayWorkers:
    """Several processes: each makes all routers of the base weights that it has run, so that none are run twice."""

    cluster: Cluster
    actors: list[Any]
    progress: Progress
    _of_base: dict[str, int] = field(default_factory=dict)
    """Number of the process that has run a base, by the base's key."""

    def make_routers(self, candidates: Sequence[Candidate]) -> list[Routers | Failure]:
        """Make the routers of each candidate, where its base weights were run, or next will be."""
        waiting = [self._actor_of(candidate).make_routers.remote(candidate) for candidate in candidates]
        return self.cluster.results(waiting, self._reporting("routers", candidates))

    def losses(self, candidates: Sequence[Candidate], windows: Sequence[Window]) -> list[list[float] | Failure]:
        """Compute the losses of each candidate, dealt out to the processes in turn."""
        text, count = self.cluster.ray.put(tuple(windows)), len(self.actors)
        hands = [list(candidates[number::count]) for number in range(count)]
        waiting = [actor.losses.remote(hand, text) for actor, hand in zip(self.actors, hands, strict=True) if hand]
        dealt = self.cluster.results(waiting, self._reporting("losses", candidates))
        return [dealt[number % count][number // count] for number in range(len(candidates))]

    def _actor_of(self, candidate: Candidate) -> Any:
        loads = list(self._of_base.values())
        least = min(range(len(self.actors)), key=lambda number: (loads.count(number), number))
        return self.actors[self._of_base.setdefault(candidate.base_key, least)]

    def _reporting(self, stage: Stage, candidates: Sequence[Candidate]) -> Callable[[int, int], None]:
        return partial(self.progress, Task(stage, listed(candidates), in_parts=True))


@contextmanager
def ray_workers(
    address: str, count: int | None, compute: Compute, options: PassOptions, progress: Progress
) -> Iterator[RayWorkers]:
    """A context with processes of a Ray cluster as workers.

    Args:
        address: `local` for processes on this machine, `auto` for a cluster that it belongs to, or a cluster's address.
        count: the number of processes; None for one for each GPU if the pass is on one, else for each CPU; at most as
            many as recipes are tried together.
        compute: the device and dtype of losses.
        options: how base models are run for the routers.
        progress: called as processes finish what they do.

    Raises:
        RefusedError: Ray is not installed, there is no such cluster, or it has no room for so many processes.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "16777216")  # as `return_freed_memory` of moemerge.cli.console
    on_gpu = compute.device.type == "cuda"
    # Processes that are killed, as when a search is interrupted, remove nothing; here that is done for them.
    kept = TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True)
    with kept as folder, ray_cluster(address, count) as cluster:
        number = count or cluster.processes(on_gpu, most=TOGETHER)
        with cluster.actors(_Worker, [(compute, options, Path(folder))] * number, on_gpu) as actors:
            yield RayWorkers(cluster, actors, progress)
            cluster.results([actor.close.remote() for actor in actors])
