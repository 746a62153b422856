"""A repository on the Hub that processes of a Ray cluster send shards to, from machines that share nothing."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint.writer import ShardWriter
from moemerge.errors import MoemergeError, RefusedError
from moemerge.merging.destinations import Hub, Unfinished
from moemerge.merging.merge_work import Work, router_bands
from moemerge.merging.on_cluster import OnCluster
from moemerge.merging.shard_jobs import ShardJob, ShardWorker, Surroundings, jobs_of

if TYPE_CHECKING:
    from moemerge.publish.publisher import Publisher
    from moemerge.routers.report import RoutingReport


class HubWorker(ShardWorker):
    """Makes shards in a folder for temporary files, and sends their bytes."""

    def __init__(self, here: Surroundings, writer: Callable[..., ShardWriter], publisher: "Publisher") -> None:
        """Keep what all shards have in common; see `ShardWorker`."""
        super().__init__(here, writer)
        self._publisher = publisher

    def check(self) -> None:
        """Make sure that the Hub takes files from this process; see `ShardWorker.check`."""
        super().check()
        try:
            self._publisher.open()
        except MoemergeError as error:
            raise RefusedError(f"--ray: on {self.host}: {error}") from error

    def run(self, job: ShardJob) -> Any:
        """Write and send one shard; returns what the process that deals them out commits. See `ShardWorker.write`."""
        with tempfile.TemporaryDirectory(prefix="moemerge-") as folder:
            path = Path(folder) / job.shard.name
            self.write(job, path)
            return self._publisher.upload(path)


@dataclass(frozen=True)
class SharedHub(OnCluster, Hub):
    """A repository on the Hub: each process makes a shard, sends it and removes it, while others do the same.

    When each could do that, this process creates the repository, where it is missing. It makes the routers, then
    commits what was sent, and sends everything else.
    """

    def begin(self) -> None:
        """Leave the repository as it is until `write`, since processes may still refuse."""

    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Compute the routers, have the other shards sent, and send those of the routers."""
        plan, tally = work.plan, shards.tally
        jobs = list(jobs_of(plan, [shard for shard in plan.shards_without_routers if shard.name not in shards.kept]))
        arguments = (Surroundings.of(jobs), work.make_writer, self.publisher)
        self.ask(HubWorker, arguments, jobs)
        self.publisher.create()
        routers = work.init_routers(tally)
        self.publisher.begin_streaming()
        with self.dealt(HubWorker, arguments, jobs, partial(tally.weights, 0)) as done:
            for job, sent in done:
                shards.journal.record(job.shard, self.publisher.add(sent))
                tally.weights(job.shard.tensor_bytes)
        self.write_and_send(work, shards, router_bands(plan, routers))
        return routers.report
