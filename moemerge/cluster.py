"""Processes of a Ray cluster, on one machine or several."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from moemerge.errors import MoemergeError, RefusedError

_LOCAL: Final = "local"
# Of a process that was killed, as for want of memory.
_RESTARTS: Final = 2


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    ray: Any
    """The module `ray`."""

    def processes(self, of_gpu: bool, most: int | None = None) -> int:
        """How many processes the cluster has room for: one for each GPU, or for each CPU; at least one.

        Args:
            of_gpu: whether each process needs a GPU.
            most: the largest number that is wanted, if any.
        """
        held = int(self.ray.cluster_resources().get("GPU" if of_gpu else "CPU", 1))
        return max(1, held if most is None else min(most, held))

    @contextmanager
    def actors(self, kind: type, arguments: tuple[Any, ...], count: int, of_gpu: bool) -> Iterator[list[Any]]:
        """A context with `count` processes, each with an object of `kind` that is made of `arguments`.

        The CPUs of the cluster are shared out to them evenly. A process that dies is begun anew, and is asked again for
        what it had not finished, twice at most.
        """
        shares = {
            "num_cpus": max(1, int(self.ray.cluster_resources().get("CPU", 1)) // count),
            "num_gpus": int(of_gpu),
        }
        made = self.ray.remote(kind).options(**shares, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
        actors = [made.remote(*arguments) for _ in range(count)]
        try:
            yield actors
        finally:
            for actor in actors:
                self.ray.kill(actor)

    def results(self, waiting: list[Any], progress: Callable[[int, int], None] = lambda _done, _all: None) -> list[Any]:
        """Wait for results, in the order in which they were asked for.

        Args:
            waiting: the references that remote calls returned.
            progress: called with the number of results that are there, and all of them.

        Raises:
            MoemergeError: a process failed, and so did those that took its place.
        """
        left = list(waiting)
        while left:
            progress(len(waiting) - len(left), len(waiting))
            _, left = self.ray.wait(left)
        progress(len(waiting), len(waiting))
        try:
            return list(self.ray.get(waiting))
        except self.ray.exceptions.RayError as error:
            raise MoemergeError(f"a process of the Ray cluster failed: {error}") from error


@contextmanager
def ray_cluster(address: str, count: int | None) -> Iterator[Cluster]:
    """A context that is connected to a Ray cluster; a connection that was there is used, and stays.

    Args:
        address: `local` for processes on this machine, `auto` for a cluster that it belongs to, or a cluster's address.
        count: how many CPUs a cluster that is begun by `local` is told that it has; None for all of the machine's.

    Raises:
        RefusedError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise RefusedError("--ray: ray is needed: pip install 'moemerge[ray]'.") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    began = not ray.is_initialized()
    if began:
        _connect(ray, address, count)
    try:
        yield Cluster(ray)
    finally:
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
