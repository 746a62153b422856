"""Destinations of a merge: a folder, or the Hub, to which shards are sent one by one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import staged
from moemerge.merging.merge_work import Tally, Work, router_bands
from moemerge.merging.options import MergeOptions
from moemerge.merging.output_checks import check_output, check_streaming, replacing
from moemerge.planning.output import Computed
from moemerge.planning.plan import MergePlan

if TYPE_CHECKING:
    from moemerge.publish.publisher import Publisher
    from moemerge.routers.report import RoutingReport


@dataclass(frozen=True)
class Unfinished:
    """The shards of a merge that is under way, and those of them that an earlier run completed."""

    folder: Path
    journal: Journal
    kept: set[str]
    """Names of the shards that are complete already."""
    tally: Tally


class Destination(ABC):
    """The destination of a merge; its methods are called in the order in which they are defined here."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the model in its card."""

    @property
    def final(self) -> Path | None:
        """The folder on this machine that the model will be in; None if there is none."""
        return None

    @property
    def identity(self) -> Mapping[str, str]:
        """Facts, beside the plan's fingerprint, that have to be the same for a merge to be resumed."""
        return {}

    @abstractmethod
    def check(self, plan: MergePlan, options: MergeOptions, made_bytes: int) -> None:
        """Refuse a destination that could not be written, or would lose files.

        Args:
            plan: the plan to carry out.
            options: the options of the merge.
            made_bytes: bytes of files that the plan does not count.

        Raises:
            RefusedError: something would be lost.
            OutputError: the destination cannot be written.
        """

    @abstractmethod
    def staged(self, plan: MergePlan, options: MergeOptions) -> AbstractContextManager[Path]:
        """A context with the folder in which shards are made."""

    def held(self, options: MergeOptions) -> Mapping[str, tuple[str, int]] | None:
        """SHA-256 and size in bytes of each file on the Hub, by name; None where shards stay in the folder."""
        del options
        return None

    @abstractmethod
    def begin(self) -> None:
        """Prepare the destination, when nothing is left to refuse and the work begins."""

    @abstractmethod
    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Compute the routers, and write every shard that is not complete; returns the routing report."""

    def finish(self, folder: Path) -> None:
        """Complete the destination, when all files but sent shards are in the folder."""
        del folder


@dataclass(frozen=True)
class Folder(Destination):
    """A folder that is complete when the merge returns, and untouched when it raises.

    What was cut off after its first complete shard is kept beside it for a run with `resume`.
    """

    path: Path
    model: str | None = None
    """Name of the model in its card; None for the folder's name."""
    ready: Callable[[], None] = lambda: None
    """Called when nothing is left to refuse, before the work begins; may raise."""

    @property
    def name(self) -> str:
        """Name of the model in its card: `model`, or the folder's name."""
        return self.model or self.path.resolve().name

    @property
    def final(self) -> Path:
        """The folder itself."""
        return self.path

    def check(self, plan: MergePlan, options: MergeOptions, made_bytes: int) -> None:
        """Refuse a folder that holds something else, or a disk without room."""
        check_output(plan, self.path, overwrite=options.overwrite, made_bytes=made_bytes)

    def staged(self, plan: MergePlan, options: MergeOptions) -> AbstractContextManager[Path]:
        """A context with a folder beside the target, which takes the target's name at the end."""
        replaced = replacing(plan, overwrite=options.overwrite)
        return staged(self.path, plan.folders, **replaced, resume=options.resume)

    def begin(self) -> None:
        """Call `ready`."""
        self.ready()

    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Write the shards; routers are computed while the other tensors are copied."""
        outputs, tally = work.plan.outputs, shards.tally
        kept, completed = shards.kept, shards.journal.record
        with work.writer(shards.folder, work.plan.shards, tally, kept=kept, completed=completed) as writer:
            writer.add({name: o.origin for name, o in outputs.items() if not isinstance(o.origin, Computed)})
            routers = work.init_routers_beside(writer, tally)
            writer.add(router_bands(work.plan, routers))
        return routers.report


class Streamed(Destination):
    """A place elsewhere: each shard is sent when it is complete, then removed from the disk.

    Never are there more than two of them. Routers come first, the index, `config.json` and the model card last.
    """

    scratch: Path
    """A folder that need not exist; shards are made beside it, and nothing is left there."""

    def check(self, plan: MergePlan, options: MergeOptions, made_bytes: int) -> None:
        """Refuse a folder beside which two shards cannot be written."""
        del options, made_bytes
        check_streaming(plan, self.scratch)

    def staged(self, plan: MergePlan, options: MergeOptions) -> AbstractContextManager[Path]:
        """A context with a folder that is removed at the end."""
        return staged(self.scratch, plan.folders, resume=options.resume, temporary=True)

    @abstractmethod
    def _begin_sending(self, shards: Unfinished) -> None:
        """Prepare the place for shards."""

    @abstractmethod
    def _send(self, shard: Shard, shards: Unfinished) -> None:
        """Send a complete shard, and record it."""

    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Write and send the shards: routers come first, so that a shard is complete when it is written.

        A shard is sent while the next one is written.
        """
        routers = work.init_routers(shards.tally)
        made = router_bands(work.plan, routers)
        bands = {name: made.get(name, output.bands) for name, output in work.plan.outputs.items()}
        self._begin_sending(shards)
        self.write_and_send(work, shards, bands)
        return routers.report

    def write_and_send(self, work: Work, shards: Unfinished, bands: Mapping[str, tuple[Band, ...]]) -> None:
        """Write and send the shards that are not complete and have all their tensors among `bands`."""
        complete: list[Shard] = []
        for shard in work.plan.shards:
            if shard.name not in shards.kept and shard.starts.keys() <= bands.keys():
                with work.writer(shards.folder, [shard], shards.tally) as writer:
                    writer.add(bands)
                    if complete:
                        self._hand_over(complete.pop(), shards)
                complete.append(shard)
        self._hand_over(complete.pop(), shards)

    def _hand_over(self, shard: Shard, shards: Unfinished) -> None:
        self._send(shard, shards)
        (shards.folder / shard.name).unlink()


@dataclass(frozen=True)
class Hub(Streamed):
    """A repository on the Hub. What was cut off is kept there, and beside `scratch` a list of it, for `resume`."""

    scratch: Path
    publisher: "Publisher"
    """A publisher that is open; it creates the repository when nothing is left to refuse."""

    @property
    def name(self) -> str:
        """Name of the model in its card: that of the repository."""
        return self.publisher.repo

    @property
    def identity(self) -> Mapping[str, str]:
        """The repository, which has to be the same for a merge to be resumed."""
        return {"destination": self.publisher.repo}

    def held(self, options: MergeOptions) -> Mapping[str, tuple[str, int]]:
        """SHA-256 and size in bytes of each large file in the repository, by name, if it may be written to."""
        self.publisher.check_streaming(overwrite=options.overwrite)
        return self.publisher.held()

    def begin(self) -> None:
        """Create the repository, where it is missing."""
        self.publisher.create()

    def _begin_sending(self, shards: Unfinished) -> None:
        """Prepare the repository; weights that a cut-off run sent stay."""
        del shards
        self.publisher.begin_streaming()

    def _send(self, shard: Shard, shards: Unfinished) -> None:
        """Send a shard, and record it once the Hub has confirmed its hash."""
        shards.journal.record(shard, self.publisher.send(shards.folder / shard.name))

    def finish(self, folder: Path) -> None:
        """Send the remaining files, which make the model complete."""
        self.publisher.finish(folder)
