"""Filling output files from their sources, by a few threads in the background: headers first, then every tensor."""

import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from moemerge.checkpoint.convert import convert, ended_inside
from moemerge.checkpoint.copy import Report, copy_range, write_all, write_failure
from moemerge.checkpoint.disk import allocate, flush, forget
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.shards import Shard

if TYPE_CHECKING:
    from typing_extensions import Self

# Kernel copies wait for the disk, not the processor: more threads than this queue behind each other.
MAX_THREADS: Final = 4
# Small enough that Ctrl-C and the progress bar are prompt, large enough that the calls cost nothing.
CHUNK_BYTES: Final = 64 * 2**20
LOW_MEMORY_CHUNK_BYTES: Final = 8 * 2**20
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


class _StoppedError(Exception):
    """Another thread failed, or the user gave up."""


class ShardWriter:
    """Writes shards while the caller does other work: a context that ends when every tensor is on the disk.

    Each file is preallocated to its final size when the context begins; `add` then names the pieces, in any order and
    number of calls. A shard with all its tensors is flushed to the disk before `completed` is told.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], report: Report, *, seed: int = 0, kept: Collection[str] = (),
        completed: Callable[[Shard], None] = lambda _: None, low_memory: bool = False,
    ) -> None:  # fmt: skip
        """Prepare to write `shards` into `folder`.

        Args:
            folder: an existing folder; files in it are overwritten.
            shards: what to write where.
            report: called with the number of bytes written, from one thread at a time.
            seed: of the noise.
            kept: names of shards that are complete already, and left alone.
            completed: called with each shard that is safely on the disk, from one thread at a time.
            low_memory: one thread, small chunks, and nothing left in the page cache.
        """
        self._folder, self._seed, self._low_memory, self._completed = folder, seed, low_memory, completed
        self._report = report
        self._shards = [shard for shard in shards if shard.name not in kept]
        self._missing = {shard.name: len(shard.starts) for shard in self._shards}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._copiers = ThreadPoolExecutor(1 if low_memory else min(MAX_THREADS, os.cpu_count() or 1))
        # Flushing waits for the disk; the copiers go on meanwhile.
        self._flusher = ThreadPoolExecutor(1)
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> "Self":
        for shard in self._shards:
            path = self._folder / shard.name
            try:
                with path.open("wb") as file:
                    file.write(shard.header)
                    file.flush()
                    allocate(file.fileno(), shard.nbytes)
            except OSError as error:
                raise write_failure(path, error) from error
        return self

    def add(self, pieces: Mapping[str, Piece]) -> None:
        """Begin to write tensors, in the order of their shards; those of kept shards are passed over."""
        for shard in self._shards:
            for name, start in shard.starts.items():
                if name in pieces:
                    self._jobs.append(self._copiers.submit(self._write, shard, name, start, pieces[name]))

    def check(self) -> None:
        """Raise what a thread failed with.

        Raises:
            CheckpointError: a source is not what its header said.
            OutputError: the disk is full or cannot be written.
        """
        for job in self._jobs:
            error = job.exception() if job.done() and not job.cancelled() else None
            if error and not isinstance(error, _StoppedError):
                raise error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if kind is None:
                wait(self._jobs, return_when=FIRST_EXCEPTION)
                self.check()
                self._copiers.shutdown()
                wait(self._jobs, return_when=FIRST_EXCEPTION)  # and the flushes that the last copies asked for
                self.check()
                if lost := [name for name, missing in self._missing.items() if missing]:
                    raise ValueError(f"{lost[0]}: some of its tensors were never added")
                finished = True
        finally:
            if not finished:
                self._stop.set()
            self._copiers.shutdown(cancel_futures=True)
            self._flusher.shutdown(cancel_futures=True)

    def _write(self, shard: Shard, name: str, start: int, piece: Piece) -> None:
        target = self._folder / shard.name
        _write_piece(piece, target, start, f"{self._seed} {name}", self._report_or_stop, low_memory=self._low_memory)
        with self._lock:
            self._missing[shard.name] -= 1
            complete = self._missing[shard.name] == 0
        if complete:
            self._jobs.append(self._flusher.submit(self._flush, shard))

    def _flush(self, shard: Shard) -> None:
        path = self._folder / shard.name
        try:
            flush(path)
        except OSError as error:
            raise write_failure(path, error) from error
        self._completed(shard)

    def _report_or_stop(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._report(nbytes)


def _write_piece(piece: Piece, path: Path, start: int, seed: str, report: Report, *, low_memory: bool) -> None:
    target = os.open(path, os.O_WRONLY | _BINARY)
    try:
        if isinstance(piece.source, bytes):
            os.lseek(target, start, os.SEEK_SET)
            write_all(target, piece.source)
            report(len(piece.source))
            return
        with piece.source.path.open("rb", buffering=0) as source:
            if low_memory:
                report = _forgetting(report, source.fileno(), target)
            if piece.is_unchanged:
                copied = copy_range(
                    source.fileno(), piece.source.start, target, start, piece.source.nbytes, report,
                    chunk_bytes=LOW_MEMORY_CHUNK_BYTES if low_memory else CHUNK_BYTES,
                )  # fmt: skip
                if copied < piece.source.nbytes:
                    raise ended_inside(piece.source)
            else:
                os.lseek(target, start, os.SEEK_SET)
                convert(
                    source, piece.source, target, piece.dtype, report,
                    scale=piece.scale, noise_scale=piece.noise_scale, seed=seed,
                )  # fmt: skip
            if low_memory:
                forget(source.fileno())
                forget(target)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        os.close(target)


def _forgetting(report: Report, *files: int) -> Report:
    """The same report, which also keeps files out of the page cache, a chunk behind what is done."""
    cached = 0

    def forget_behind(nbytes: int) -> None:
        nonlocal cached
        cached += nbytes
        if cached >= LOW_MEMORY_CHUNK_BYTES:
            cached = 0
            for file in files:
                forget(file)
        report(nbytes)

    return forget_behind
