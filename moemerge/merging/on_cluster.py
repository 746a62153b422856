"""Destinations whose shards processes of a Ray cluster make."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.joining import ray_cluster
from moemerge.merging.destinations import Destination
from moemerge.merging.options import MergeOptions
from moemerge.merging.shard_jobs import ShardJob, ShardWorker
from moemerge.planning.plan import MergePlan


@dataclass(frozen=True)
class OnCluster(Destination):
    """The first base of a destination whose shards are made by processes of a Ray cluster; the second is its place."""

    address: str = "local"
    """`local` for processes on this machine, `auto` for a cluster that it belongs to, or a cluster's address."""
    workers: int | None = None
    """How many processes make shards; None for one on each machine."""

    @contextmanager
    def staged(self, plan: MergePlan, options: MergeOptions) -> Iterator[Path]:
        """A context that is connected to the cluster; see `Destination.staged`.

        Raises:
            RefusedError: there is no such cluster, or Ray is not installed.
        """
        with ray_cluster(self.address, self.workers), super().staged(plan, options) as stage:  # type: ignore[safe-super]
            yield stage

    def ask(self, kind: type[ShardWorker], arguments: tuple[Any, ...], jobs: Sequence[ShardJob]) -> None:
        """Have processes check that they could do the jobs, as many as there will be.

        Raises:
            RefusedError: one of them could not.
        """
        with ray_cluster(self.address, self.workers) as cluster:
            count = min(self.workers or cluster.machines, len(jobs))
            with cluster.actors(kind, [arguments] * count, of_gpu=False) as asked:
                cluster.results([one.check.remote() for one in asked])

    @contextmanager
    def dealt(
        self,
        kind: type[ShardWorker],
        arguments: tuple[Any, ...],
        jobs: Sequence[ShardJob],
        waiting: Callable[[], None],
    ) -> Iterator[Iterator[tuple[ShardJob, Any]]]:
        """A context with jobs as processes do them; these end with it. See `moemerge.cluster.Cluster.dealt`."""
        with ray_cluster(self.address, self.workers) as cluster:
            count = self.workers or cluster.machines
            with closing(cluster.dealt(kind, arguments, jobs, count, waiting)) as done:
                yield done
