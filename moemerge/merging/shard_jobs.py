"""Shards that other processes write, each by itself."""

import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

from moemerge.checkpoint.copy import write_failure
from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.files import Stamp
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.writer import ShardWriter
from moemerge.errors import CheckpointError, RefusedError
from moemerge.planning.plan import MergePlan

# Of a folder that processes share: the file that says so.
_SIGN: Final = ".shared"
_SHARED: Final = "All processes of --ray need it at the same path: put it on a disk that their machines share"


@dataclass(frozen=True)
class ShardJob:
    """One shard, and all that a process needs to write it."""

    shard: Shard
    bands: Mapping[str, tuple[Band, ...]]
    """The bands of each of its tensors, by name."""
    stamps: Mapping[Path, Stamp]
    """The stamps of the local files that they are read from, as the plan has seen them."""


@dataclass(frozen=True)
class Surroundings:
    """What has to be the same for every process that writes shards of a merge."""

    stamps: Mapping[Path, Stamp]
    """The stamps of all local files that shards are read from."""
    versions: str
    """Versions of what makes bytes."""

    @classmethod
    def of(cls, jobs: Sequence[ShardJob]) -> "Surroundings":
        """Those of this process."""
        return cls({path: stamp for job in jobs for path, stamp in job.stamps.items()}, _versions())


@dataclass(frozen=True)
class SharedStage:
    """The folder that all processes write shards into."""

    folder: Path
    sign: str
    """What a file in it says, by which a process knows that it sees the same folder."""

    @classmethod
    def of(cls, folder: Path) -> "SharedStage":
        """A folder that this process sees, and leaves a file in; see `forget`."""
        sign = uuid.uuid4().hex
        (folder / _SIGN).write_text(sign)
        return cls(folder, sign)

    def forget(self) -> None:
        """Remove what is left in the folder beside shards: this process's file, and those of processes that died."""
        for path in (self.folder / _SIGN, *self.folder.glob(_draft("*", "*"))):
            path.unlink(missing_ok=True)


class ShardWorker:
    """Writes shards in a process of its own; each kind puts them elsewhere."""

    def __init__(self, here: Surroundings, writer: Callable[..., ShardWriter]) -> None:
        """Keep what all shards have in common.

        Args:
            here: what this process has to have in common with all others.
            writer: makes a writer of a folder, shards and a report.
        """
        self._here, self._writer, self.host = here, writer, socket.gethostname()

    def check(self) -> None:
        """Make sure that this process sees the same sources, and would write the same bytes.

        Raises:
            RefusedError: it does not; names the machine, and what is missing there.
        """
        here = self._here
        if _versions() != here.versions:
            raise RefusedError(
                f"--ray: {self.host} has {_versions()}, and this machine {here.versions}. Install the same there."
            )
        for path, stamp in here.stamps.items():
            if problem := _difference(path, stamp):
                raise RefusedError(f"--ray: on {self.host}, {path} {problem}. {_SHARED}, or copy it with its times.")

    def write(self, job: ShardJob, path: Path) -> None:
        """Write one shard into the file `path`, and wait until it is on the disk.

        Raises:
            CheckpointError: a source is not what the plan has seen.
            SourceError: a source on the Hub cannot be reached.
            OutputError: the disk is full or cannot be written.
        """
        self._check_sources(job)
        with self._writer(path.parent, [replace(job.shard, name=path.name)], lambda _: None) as writer:
            writer.add(job.bands)
        self._check_sources(job)

    def _check_sources(self, job: ShardJob) -> None:
        for path, stamp in job.stamps.items():
            if problem := _difference(path, stamp):
                raise CheckpointError(
                    f"{path}: on {self.host}, {problem}. The output would be of two models. Merge again."
                )


class FolderWorker(ShardWorker):
    """Writes shards into a folder that this process shares with others."""

    def __init__(self, here: Surroundings, writer: Callable[..., ShardWriter], stage: SharedStage) -> None:
        """Keep what all shards have in common; see `ShardWorker`."""
        super().__init__(here, writer)
        self._stage = stage

    def check(self) -> None:
        """Make sure that this process sees the same folder and may write there; see `ShardWorker.check`."""
        folder = self._stage.folder
        try:
            found = (folder / _SIGN).read_text()
        except OSError:
            found = ""
        if found != self._stage.sign:
            raise RefusedError(f"--ray: {self.host} does not see the folder {folder}. {_SHARED}.")
        super().check()
        draft = folder / _draft("probe", uuid.uuid4().hex)  # processes on one machine check at the same moment
        try:
            draft.write_text("")
            draft.unlink()
        except OSError as error:
            raise RefusedError(
                f"--ray: {self.host} may not write into {folder} ({error.strerror or error}). "
                "Let it be mounted for writing there."
            ) from error

    def run(self, job: ShardJob) -> None:
        """Write one shard, which has its name once all its bytes are on the disk; see `ShardWorker.write`.

        A process that was given up for dead may still be at work on the same shard: each try has a file of its own.
        """
        folder, name = self._stage.folder, job.shard.name
        for left in folder.glob(_draft(name, "*")):
            left.unlink(missing_ok=True)
        draft = folder / _draft(name, uuid.uuid4().hex)
        self.write(job, draft)
        try:
            draft.replace(folder / name)
        except OSError as error:
            raise write_failure(folder / name, error) from error


def jobs_of(plan: MergePlan, shards: Sequence[Shard]) -> Iterator[ShardJob]:
    """Make jobs of shards without routers, the largest first: then all processes end at about the same time."""
    for shard in sorted(shards, key=lambda shard: -shard.nbytes):
        bands = {name: plan.outputs[name].bands for name in shard.starts}
        pieces = [piece.source for tensor in bands.values() for band in tensor for piece in band]
        files = {leaf.path for source in pieces if isinstance(source, TensorInfo) for leaf in leaves(source)}
        yield ShardJob(shard, bands, {path: stamp for path, stamp in plan.origins.stamps.items() if path in files})


def _draft(name: str, attempt: str) -> str:
    """The name of a shard's file while it is written."""
    return f".{name}.{attempt}.draft"


def _difference(path: Path, stamp: Stamp) -> str:
    """How a file differs from the one with this stamp, in words; empty if it is the same, or a copy with its times."""
    try:
        found = Stamp.of(path)
    except OSError as error:
        return f"cannot be found ({error.strerror or error})"
    return "is another file" if (found.size, found.modified) != (stamp.size, stamp.modified) else ""


def _versions() -> str:
    """Versions of the packages that make the bytes of a shard; noise and drawn numbers are numpy's."""
    return f"moemerge {version('moemerge')} and numpy {np.__version__}"
