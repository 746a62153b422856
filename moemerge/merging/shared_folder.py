"""A folder that processes of a Ray cluster write, on one machine or on several that share a disk."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from moemerge.checkpoint.copy import Report
from moemerge.checkpoint.jobs import JobPool
from moemerge.checkpoint.journal import holds
from moemerge.errors import OutputError
from moemerge.merging.destinations import Folder, Unfinished
from moemerge.merging.merge_work import Work, router_bands
from moemerge.merging.on_cluster import OnCluster
from moemerge.merging.shard_jobs import FolderWorker, SharedStage, Surroundings, jobs_of

if TYPE_CHECKING:
    from moemerge.routers.report import RoutingReport


@dataclass(frozen=True)
class SharedFolder(OnCluster, Folder):
    """A folder on a disk that all machines of a Ray cluster see at its path, as they do all models.

    Each process takes the next shard when it has written one. This process makes the routers meanwhile, keeps the
    journal, and writes everything else.
    """

    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Have the shards written while routers are computed, and then write those of the routers."""
        plan = work.plan
        ready = [shard for shard in plan.shards_without_routers if shard.name not in shards.kept]
        jobs = list(jobs_of(plan, ready))
        stage = SharedStage.of(shards.folder)
        arguments = (Surroundings.of(jobs), work.make_writer, stage)

        def deal(report: Report) -> None:
            with self.dealt(FolderWorker, arguments, jobs, partial(report, 0)) as done:
                for job, _ in done:
                    shards.journal.record(job.shard)
                    shards.tally.weights(job.shard.tensor_bytes)

        try:
            with JobPool(lambda _: None, 1) as pool:
                pool.start(deal)
                routers = work.init_routers(shards.tally, pool.check)
        finally:
            stage.forget()
        if lost := [shard.name for shard in ready if not holds(shards.folder / shard.name, shard)]:
            raise OutputError(
                f"{shards.folder / lost[0]}: was written by a process of --ray, but is not seen here. Write to a disk "
                "that all machines see in the same state."
            )
        names = {shard.name for shard in plan.shards_without_routers}
        with work.writer(shards.folder, plan.shards, shards.tally, kept=names) as writer:
            writer.add(router_bands(plan, routers))
        return routers.report
