"""Where a merge goes: into a folder, or shard by shard to the Hub; and what differs between the two."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import staged
from moemerge.merging.options import MergeOptions
from moemerge.merging.output_checks import check_output, check_streaming, replacing
from moemerge.merging.work import Tally, Work
from moemerge.planning.output import Computed
from moemerge.planning.plan import MergePlan

if TYPE_CHECKING:
    from moemerge.publish.publisher import Publisher
    from moemerge.routers.report import RoutingReport


@dataclass(frozen=True)
class Unfinished:
    """Shards that are being written."""

    folder: Path
    journal: Journal
    kept: set[str]
    """Names of the shards that are complete already."""
    tally: Tally


class Destination(ABC):
    """Where a merge goes. Its methods are called in the order in which they stand here."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the model is called in its card."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What a resumed merge has to agree with, beside the plan's fingerprint."""
        return {}

    @abstractmethod
    def check(self, plan: MergePlan, options: MergeOptions, made_bytes: int) -> None:
        """Refuse a place that could not be written, or would lose something; `made_bytes` are beside the plan's."""

    @abstractmethod
    def staged(self, plan: MergePlan, options: MergeOptions) -> AbstractContextManager[Path]:
        """The folder in which shards are made, until the block ends."""

    def held(self, options: MergeOptions) -> Mapping[str, tuple[str, int]] | None:
        """By name the hash and the size of what the Hub has; None where shards stay in the folder."""
        del options
        return None

    @abstractmethod
    def begin(self) -> None:
        """Nothing is left to refuse, and the work begins."""

    @abstractmethod
    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Write every shard that is not complete, and compute the routers in them."""

    def finish(self, folder: Path) -> None:
        """Everything is in the folder that is to be in it."""
        del folder


@dataclass(frozen=True)
class Folder(Destination):
    """A folder that is complete when the merge returns, and untouched when it raises.

    What was cut off after its first complete shard is kept beside it for a run with `resume`.
    """

    path: Path
    model: str | None = None
    """What the model is called in its card; else as the folder."""
    ready: Callable[[], None] = lambda: None
    """Called when nothing is left to refuse, before the work begins; may raise."""

    @property
    def name(self) -> str:
        """As it is asked for, or as the folder."""
        return self.model or self.path.resolve().name

    def check(self, plan: MergePlan, options: MergeOptions, made_bytes: int) -> None:
        """Refuse a folder that holds something else, or a disk without room."""
        check_output(plan, self.path, overwrite=options.overwrite, made_bytes=made_bytes)

    def staged(self, plan: MergePlan, options: MergeOptions) -> AbstractContextManager[Path]:
        """A folder beside the target, which takes its name at the end."""
        replaced = replacing(plan, overwrite=options.overwrite)
        return staged(self.path, plan.folders, **replaced, resume=options.resume)

    def begin(self) -> None:
        """Say so."""
        self.ready()

    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Routers are computed while the other tensors are copied."""
        outputs, tally = work.plan.outputs, shards.tally
        kept, completed = shards.kept, shards.journal.record
        with work.writer(shards.folder, work.plan.shards, tally, kept=kept, completed=completed) as writer:
            writer.add({name: o.origin for name, o in outputs.items() if not isinstance(o.origin, Computed)})
            routers = work.init_routers_beside(writer, tally)
            writer.add(work.router_bands(routers))
        return routers.report


@dataclass(frozen=True)
class Hub(Destination):
    """A repository on the Hub: each shard is sent when it is complete, then removed from the disk.

    Never are there more than two of them. Routers come first, the index, `config.json` and the model card last. What
    was cut off is kept on the Hub, and beside `scratch` a list of it, for a run with `resume`.
    """

    scratch: Path
    """A folder that need not exist; shards are made beside it, and nothing is left there."""
    publisher: "Publisher"
    """Opened. What is missing on the Hub is created when nothing is left to refuse."""

    @property
    def name(self) -> str:
        """As the repository."""
        return self.publisher.repo

    @property
    def identity(self) -> Mapping[str, str]:
        """What was sent lies in one repository."""
        return {"destination": self.publisher.repo}

    def check(self, plan: MergePlan, options: MergeOptions, made_bytes: int) -> None:
        """Refuse a folder beside which two shards cannot be written."""
        del options, made_bytes
        check_streaming(plan, self.scratch)

    def staged(self, plan: MergePlan, options: MergeOptions) -> AbstractContextManager[Path]:
        """A folder that is gone at the end."""
        return staged(self.scratch, plan.folders, resume=options.resume, temporary=True)

    def held(self, options: MergeOptions) -> Mapping[str, tuple[str, int]]:
        """What the repository has, if it may be written to."""
        self.publisher.check_streaming(overwrite=options.overwrite)
        return self.publisher.held()

    def begin(self) -> None:
        """Create the repository, where it is missing."""
        self.publisher.create()

    def write(self, work: Work, shards: Unfinished) -> "RoutingReport":
        """Routers come first, so that each shard is complete when it is written; one is sent while the next is made."""
        routers = work.init_routers(shards.tally.routers)
        made = work.router_bands(routers)
        bands = {name: made.get(name, output.bands) for name, output in work.plan.outputs.items()}
        self.publisher.begin_streaming()
        complete: list[Shard] = []
        for shard in work.plan.shards:
            if shard.name not in shards.kept:
                with work.writer(shards.folder, [shard], shards.tally) as writer:
                    writer.add(bands)
                    if complete:
                        self._send(complete.pop(), shards)
                complete.append(shard)
        self._send(complete.pop(), shards)
        return routers.report

    def _send(self, shard: Shard, shards: Unfinished) -> None:
        path = shards.folder / shard.name
        shards.journal.record(shard, self.publisher.send(path))
        path.unlink()

    def finish(self, folder: Path) -> None:
        """Send what makes the model complete."""
        self.publisher.finish(folder)
