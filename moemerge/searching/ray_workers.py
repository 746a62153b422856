"""Processes of a Ray cluster that try recipes beside each other, on one machine or several."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from moemerge.errors import MoemergeError, RefusedError
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.progress import Progress, Stage, Task
from moemerge.routers.initialisation import Routers
from moemerge.routers.request import PassOptions
from moemerge.searching.settings import TOGETHER
from moemerge.searching.trying import Bench, Candidate, Failure, bench, listed

_LOCAL: Final = "local"
# Of a process that was killed, as for want of memory.
_RESTARTS: Final = 2


class _Worker:
    """A process of the cluster, with router inputs of its own."""

    def __init__(self, compute: Compute, options: PassOptions) -> None:
        self._open = ExitStack()  # until the process ends
        self._bench: Bench = self._open.enter_context(bench(compute, options, lambda *_: None))

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

    ray: Any
    actors: list[Any]
    progress: Progress
    _of_base: dict[str, int] = field(default_factory=dict)
    """Number of the process that has run a base, by the base's key."""

    def make_routers(self, candidates: Sequence[Candidate]) -> list[Routers | Failure]:
        """Make the routers of each candidate, where its base weights were run, or next will be."""
        waiting = [self._actor_of(candidate).make_routers.remote(candidate) for candidate in candidates]
        found: list[Routers | Failure] = self._collected("routers", candidates, waiting)
        return found

    def losses(self, candidates: Sequence[Candidate], windows: Sequence[Window]) -> list[list[float] | Failure]:
        """Compute the losses of each candidate, dealt out to the processes in turn."""
        text, count = self.ray.put(tuple(windows)), len(self.actors)
        hands = [list(candidates[number::count]) for number in range(count)]
        waiting = [actor.losses.remote(hand, text) for actor, hand in zip(self.actors, hands, strict=True) if hand]
        dealt = self._collected("losses", candidates, waiting)
        return [dealt[number % count][number // count] for number in range(len(candidates))]

    def _actor_of(self, candidate: Candidate) -> Any:
        loads = list(self._of_base.values())
        least = min(range(len(self.actors)), key=lambda number: (loads.count(number), number))
        return self.actors[self._of_base.setdefault(candidate.base_key, least)]

    def _collected(self, stage: Stage, candidates: Sequence[Candidate], waiting: list[Any]) -> list[Any]:
        """Wait for results, in the order in which they were asked for.

        Raises:
            MoemergeError: a process failed, and so did those that took its place.
        """
        left = list(waiting)
        while left:
            self.progress(Task(stage, listed(candidates)), len(waiting) - len(left), len(waiting))
            _, left = self.ray.wait(left)
        self.progress(Task(stage, listed(candidates)), len(waiting), len(waiting))
        try:
            return list(self.ray.get(waiting))
        except self.ray.exceptions.RayError as error:
            raise MoemergeError(f"a process of the Ray cluster failed: {error}") from error


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
        RefusedError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise RefusedError("--ray: ray is needed: pip install 'moemerge[ray]'.") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "2097152")  # see `moemerge.cli.searching`
    began = not ray.is_initialized()
    if began:
        _connect(ray, address, count)
    kind = "GPU" if compute.device.type == "cuda" else "CPU"
    held = ray.cluster_resources()
    number = count or max(1, min(TOGETHER, int(held.get(kind, 1))))
    shares = {"num_cpus": max(1, int(held.get("CPU", 1)) // number), "num_gpus": int(kind == "GPU")}
    kind_of = ray.remote(_Worker).options(**shares, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
    actors = [kind_of.remote(compute, options) for _ in range(number)]
    try:
        yield RayWorkers(ray, actors, progress)
        ray.get([actor.close.remote() for actor in actors])
    finally:
        for actor in actors:
            ray.kill(actor)
        if began:
            ray.shutdown()


def _connect(ray: Any, address: str, count: int | None) -> None:
    options = {"num_cpus": count, "include_dashboard": False} if address == _LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError) as error:
        raise RefusedError(
            f"--ray {address}: there is no such cluster ({' '.join(str(error).split()):.200}). `--ray local` begins "
            "processes on this machine, `--ray auto` finds the cluster that it belongs to."
        ) from error
