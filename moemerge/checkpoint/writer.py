"""Filling output files from their sources, by a few threads in the background: headers first, then every tensor."""

import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from moemerge.checkpoint.convert import convert, ended_inside
from moemerge.checkpoint.copy import Report, copy_range, write_all, write_failure
from moemerge.checkpoint.disk import allocate, flush, forget
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.jobs import MAX_THREADS, Jobs
from moemerge.checkpoint.shards import Shard
from moemerge.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

# Small enough that Ctrl-C and the progress bar are prompt, large enough that the calls cost nothing.
CHUNK_BYTES: Final = 64 * 2**20
LOW_MEMORY_CHUNK_BYTES: Final = 8 * 2**20
# Written bytes go to the disk from early on: at the end of a large shard there is little left to wait for.
FLUSH_BYTES: Final = 128 * 2**20
_BINARY: Final = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one output tensor: `(source + noise_scale * N(0, 1)) * scale` as `dtype`, or bytes as they are."""

    source: StoredTensor | bytes
    dtype: str
    scale: float = 1.0
    noise_scale: float = 0.0

    @property
    def is_unchanged(self) -> bool:
        """Whether the source's bytes are the output's."""
        return isinstance(self.source, bytes) or (
            self.source.dtype == self.dtype and self.scale == 1.0 and self.noise_scale == 0.0
        )


def noise_seed(seed: int, name: str) -> str:
    """The text that the noise of one output tensor depends on: two experts made of one model get different noise."""
    return f"{seed} {name}"


class ShardWriter:
    """Writes shards while the caller does other work: a context that ends when every tensor is on the disk.

    Each file is preallocated to its final size when the context begins; `add` then names the pieces, in any order and
    number of calls. A shard with all its tensors is flushed to the disk before `completed` is told.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], report: Report, *, seed: int = 0, kept: Collection[str] = (),
        completed: Callable[[Shard], None] = lambda _: None, reserve: bool = True, low_memory: bool = False,
    ) -> None:  # fmt: skip
        """Prepare to write `shards` into `folder`.

        Args:
            folder: an existing folder; files in it are overwritten.
            shards: what to write where.
            report: called with the number of bytes written, from one thread at a time.
            seed: of the noise.
            kept: names of shards that are complete already, and left alone.
            completed: called with each shard that is safely on the disk, from one thread at a time.
            reserve: whether to claim all the room at once; not where most bytes will be shared with the sources'.
            low_memory: one thread, small chunks, and nothing left in the page cache.
        """
        self._folder, self._seed, self._low_memory, self._completed = folder, seed, low_memory, completed
        self._shards = [shard for shard in shards if shard.name not in kept]
        self._missing, self._lock = {shard.name: len(shard.starts) for shard in self._shards}, threading.Lock()
        self._written, self._reserve = 0, reserve
        self._copies = Jobs(report, 1 if low_memory else MAX_THREADS)
        # Flushing waits for the disk; copies go on meanwhile.
        self._flushes = Jobs(lambda _: None, 1)

    def __enter__(self) -> "Self":
        for shard in self._shards:
            path = self._folder / shard.name
            try:
                with path.open("wb") as file:
                    file.write(shard.header)
                    file.flush()
                    allocate(file.fileno(), shard.nbytes, reserve=self._reserve)
            except OSError as error:
                raise write_failure(path, error) from error
        return self

    def add(self, pieces: Mapping[str, Piece]) -> None:
        """Begin to write tensors, in the order of their shards; those of kept shards are passed over."""
        for shard in self._shards:
            for name in shard.starts:
                if name in pieces:
                    self._copies.start(partial(self._write, shard, name, pieces[name]))

    def check(self) -> None:
        """Raise what a thread has failed with.

        Raises:
            CheckpointError: a source is not what its header said.
            OutputError: the disk is full or cannot be written.
        """
        self._copies.check()
        self._flushes.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = True
        try:
            self._copies.__exit__(kind, error, trace)
            failed = kind is not None
        finally:
            # What is complete is flushed even when the rest is given up.
            with suppress(Exception) if failed else nullcontext():
                self._flushes.__exit__(None, None, None)
        if kind is None and (lost := [name for name, missing in self._missing.items() if missing]):
            raise ValueError(f"{lost[0]}: some of its tensors were never added")

    def _write(self, shard: Shard, name: str, piece: Piece, report: Report) -> None:
        self._flushes.check()  # a disk that fails there need not be filled first
        path, seed = self._folder / shard.name, noise_seed(self._seed, name)
        _write_piece(piece, path, shard.starts[name], seed, report, low_memory=self._low_memory)
        with self._lock:
            self._missing[shard.name] -= 1
            complete = self._missing[shard.name] == 0
            self._written += 0 if isinstance(piece.source, bytes) else piece.source.nbytes
            due = self._written >= FLUSH_BYTES
            if due:
                self._written = 0
        if complete or due:
            self._flushes.start(partial(self._flush, shard, complete=complete))

    def _flush(self, shard: Shard, _report: Report, *, complete: bool) -> None:
        path = self._folder / shard.name
        try:
            flush(path)
        except OSError as error:
            raise write_failure(path, error) from error
        if complete:
            self._completed(shard)


def convert_piece(piece: Piece, source: StoredTensor, target: int, seed: str, report: Report) -> None:
    """Write what becomes of a piece's source, which is not copied as it is, at the target's position.

    Raises:
        CheckpointError: the source is not what its header said, or a finite weight is infinite in the piece's dtype.
    """
    with _open(source) as file:
        convert(file, source, target, piece.dtype, report, scale=piece.scale, noise_scale=piece.noise_scale, seed=seed)


def _write_piece(piece: Piece, path: Path, start: int, seed: str, report: Report, *, low_memory: bool) -> None:
    source = piece.source
    target = os.open(path, os.O_WRONLY | _BINARY)
    try:
        os.lseek(target, start, os.SEEK_SET)
        if isinstance(source, bytes):
            write_all(target, source)
            report(len(source))
            return
        with _open(source) as file:
            if low_memory:
                report = _forgetting(report, file.fileno(), target)
            if piece.is_unchanged:
                chunk_bytes = LOW_MEMORY_CHUNK_BYTES if low_memory else CHUNK_BYTES
                copied = copy_range(
                    file.fileno(), source.start, target, start, source.nbytes, report, chunk_bytes=chunk_bytes
                )
                if copied < source.nbytes:
                    raise ended_inside(source)
            else:
                convert_piece(piece, source, target, seed, report)
            if low_memory:
                forget(file.fileno())
                forget(target, written=True)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        os.close(target)


def _open(source: StoredTensor) -> FileIO:
    try:
        return source.path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{source.path}: cannot be read: {error.strerror}. Was it moved meanwhile?") from error


def _forgetting(report: Report, source: int, target: int) -> Report:
    """The same report, which also keeps both files out of the page cache, a chunk behind what is done."""
    cached = 0

    def forget_behind(nbytes: int) -> None:
        nonlocal cached
        cached += nbytes
        if cached >= LOW_MEMORY_CHUNK_BYTES:
            cached = 0
            forget(source)
            forget(target, written=True)
        report(nbytes)

    return forget_behind
