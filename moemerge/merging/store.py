"""An object store as the destination of a merge."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint.disk import cache_folder
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import journal_of
from moemerge.errors import BusyError, RefusedError
from moemerge.merging.destinations import Streamed, Unfinished
from moemerge.merging.options import MergeOptions
from moemerge.planning.plan import MergePlan
from moemerge.publish.store import StoreOutput
from moemerge.sources.reference import Location


@dataclass(frozen=True)
class Store(Streamed):
    """A folder of an object store. What was cut off is kept there, with a list of it, for a run with `resume`.

    Such a run may be on another machine.
    """

    scratch: Path
    output: StoreOutput

    @property
    def name(self) -> str:
        """Name of the model in its card: the last part of the address."""
        return self.output.name

    @property
    def identity(self) -> Mapping[str, str]:
        """The address, which has to be the same for a merge to be resumed."""
        return {"destination": str(self.output.location)}

    def check(self, plan: MergePlan, options: MergeOptions, made_bytes: int) -> None:
        """Refuse a folder of the store that holds something else, or a disk without room for two shards."""
        self._check_place(plan, options)
        super().check(plan, options, made_bytes)

    def _check_place(self, plan: MergePlan, options: MergeOptions) -> None:
        self.output.check(plan.sources, overwrite=options.overwrite, resume=options.resume, written=plan.file_names)

    @contextmanager
    def staged(self, plan: MergePlan, options: MergeOptions) -> Iterator[Path]:
        """A context with a folder that is removed at the end; the journal is the one in the store."""
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(super().staged(plan, options))
            except BusyError:  # which names the folder in the cache
                raise BusyError(
                    f"{self.output.location}: another moemerge on this machine is writing to it. Wait for it to end."
                ) from None
            self.output.look()  # a merge on this machine may have ended since
            self._check_place(plan, options)
            journal_of(folder).restore(self.output.journal if options.resume else "")
            if not options.resume:
                self.output.announce_unfinished()
            try:
                yield folder
            except BaseException:
                self.output.give_up()
                journal_of(folder).remove()  # nothing here is worth to be kept
                raise

    def held(self, options: MergeOptions) -> Mapping[str, tuple[str, int]]:
        """SHA-256 and size in bytes of the shards that an unfinished merge has sent, by name."""
        del options
        return self.output.held()

    def begin(self) -> None:
        """Make sure that the store takes something; what is there stays until the first shard is made."""
        self.output.claim()

    def _begin_sending(self, shards: Unfinished) -> None:
        self.output.begin(shards.journal.text, shards.kept)

    def _send(self, shard: Shard, shards: Unfinished) -> None:
        shards.journal.record(shard, self.output.send(shards.folder / shard.name))
        self.output.note(shards.journal.text)

    def finish(self, folder: Path) -> None:
        """Send the remaining files, and the object that makes the model complete."""
        self.output.finish(folder)


def scratch_for(location: Location) -> Path:
    """The folder in the user's cache beside which the shards for a place in a store are made.

    Raises:
        RefusedError: the user has no cache.
    """
    cache = cache_folder("stores")
    if cache is None:
        raise RefusedError(
            f"{location}: shards are made in a folder of your cache, and you have none. Set XDG_CACHE_HOME to a folder."
        )
    return cache / f"to-{hashlib.sha256(str(location).encode()).hexdigest()[:16]}"
