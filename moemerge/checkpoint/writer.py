"""Fill output files from their sources by a few threads in the background: headers first, then every tensor."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from moemerge.checkpoint.bands import band_chunks
from moemerge.checkpoint.convert import ended_inside
from moemerge.checkpoint.copy import Report, copy_range, write_all, write_failure
from moemerge.checkpoint.disk import allocate, flush, forget
from moemerge.checkpoint.files import Readable
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.jobs import MAX_THREADS, JobPool
from moemerge.checkpoint.pieces import Band, band_bytes, measure, with_seeds
from moemerge.checkpoint.shards import Shard

if TYPE_CHECKING:
    from typing_extensions import Self

# Small enough that Ctrl-C and the progress bar are prompt, large enough that the calls cost nothing.
CHUNK_BYTES: Final = 64 * 2**20
LOW_MEMORY_CHUNK_BYTES: Final = 8 * 2**20
# Flushing starts early, so that there is little left to wait for at the end of a large shard.
FLUSH_BYTES: Final = 128 * 2**20
RECEIVED_BYTES: Final = 2**20
_BINARY: Final = getattr(os, "O_BINARY", 0)


class ShardWriter:
    """Writes shards in the background: a context that ends when every tensor is on the disk.

    Each file is preallocated to its final size when the context begins; `add` then gives the pieces of tensors, in any
    order and number of calls. A shard with all its tensors is flushed to the disk before `completed` is called.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        report: Report,
        *,
        seed: int = 0,
        completed: Callable[[Shard], None] = lambda _: None,
        reserve: bool = True,
        low_memory: bool = False,
        threads: int = MAX_THREADS,
    ) -> None:
        """Prepare to write `shards` into `folder`.

        Args:
            folder: an existing folder; files in it are overwritten.
            shards: what to write where.
            report: called with the number of bytes written, from one thread at a time.
            seed: the seed of the noise.
            completed: called with each shard that is safely on the disk, from one thread at a time.
            reserve: whether to reserve all the space at once; False where most bytes will be shared with the sources'.
            low_memory: whether to use small chunks and leave nothing in the page cache.
            threads: how many tensors are written at once.
        """
        self._folder, self._seed, self._low_memory, self._completed = folder, seed, low_memory, completed
        self._shards = shards
        self._missing, self._lock = {shard.name: len(shard.starts) for shard in self._shards}, threading.Lock()
        self._written, self._reserve = 0, reserve
        self._copies = JobPool(report, threads)
        # Flushing waits for the disk; copies go on meanwhile.
        self._flushes = JobPool(lambda _: None, 1)

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

    def add(self, tensors: Mapping[str, tuple[Band, ...]]) -> None:
        """Begin to write tensors, in the order of their shards; those of other shards are skipped.

        Raises:
            ValueError: a tensor's pieces do not fit together, or into its place.
        """
        for shard in self._shards:
            ends = [*list(shard.starts.values())[1:], shard.nbytes]
            for (name, start), end in zip(shard.starts.items(), ends, strict=True):
                if name not in tensors:
                    continue
                if measure(tensors[name]) != end - start:
                    raise ValueError(f"{name}: {measure(tensors[name])} bytes for a place of {end - start}")
                self._copies.start(partial(self._write, shard, name, tensors[name]))

    def check(self) -> None:
        """Raise the error of a thread that has failed.

        Raises:
            CheckpointError: a source differs from its header.
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
            # Complete shards are flushed even when the rest is given up.
            with suppress(Exception) if failed else nullcontext():
                self._flushes.__exit__(None, None, None)
        if kind is None and (lost := [name for name, missing in self._missing.items() if missing]):
            raise ValueError(f"{lost[0]}: some of its tensors were never added")

    def _write(self, shard: Shard, name: str, bands: tuple[Band, ...], report: Report) -> None:
        path, start = self._folder / shard.name, shard.starts[name]
        for band, seeds in with_seeds(bands, self._seed, name):
            self._flushes.check()  # a disk that fails there need not be filled first
            _write_band(band, seeds, path, start, report, low_memory=self._low_memory)
            start += band_bytes(band)
            self._count(shard, written=band_bytes(band))
        self._count(shard, tensors=1)

    def _count(self, shard: Shard, *, written: int = 0, tensors: int = 0) -> None:
        with self._lock:
            self._missing[shard.name] -= tensors
            complete = tensors > 0 and self._missing[shard.name] == 0
            self._written += written
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


def _write_band(band: Band, seeds: list[str], path: Path, start: int, report: Report, *, low_memory: bool) -> None:
    source = band[0].source
    try:
        with ExitStack() as opened:
            target = os.open(path, os.O_WRONLY | _BINARY)
            opened.callback(os.close, target)
            files = []
            if low_memory:
                stored = [piece.source.path for piece in band if isinstance(piece.source, TensorInfo)]
                files = [opened.enter_context(path.open("rb")).fileno() for path in stored if isinstance(path, Path)]
                report = _forgetting(report, files, target)
            if len(band) == 1 and isinstance(source, TensorInfo) and band[0].is_unchanged:
                _copy(source, target, start, report, LOW_MEMORY_CHUNK_BYTES if low_memory else CHUNK_BYTES)
            else:
                os.lseek(target, start, os.SEEK_SET)
                for chunk in band_chunks(band, seeds):
                    write_all(target, chunk)
                    report(len(chunk))
            if low_memory:
                _forget(files, target)
    except OSError as error:
        raise write_failure(path, error) from error


def _copy(source: TensorInfo, target: int, start: int, report: Report, chunk_bytes: int) -> None:
    with source.open() as reader:
        if isinstance(reader, FileIO):
            copied = copy_range(
                reader.fileno(), source.start, target, start, source.nbytes, report, chunk_bytes=chunk_bytes
            )
        else:
            os.lseek(target, start, os.SEEK_SET)
            copied = _receive(reader, target, source.nbytes, report)
    if copied < source.nbytes:
        raise ended_inside(source)


def _receive(reader: Readable, target: int, nbytes: int, report: Report) -> int:
    """Write what a reader gives at the position of the open file `target`; returns how many bytes came."""
    done, buffer = 0, memoryview(bytearray(min(nbytes, RECEIVED_BYTES)))
    while done < nbytes:
        count = reader.readinto(buffer[: nbytes - done])
        if count == 0:
            break
        write_all(target, buffer[: count or 0])
        done += count or 0
        report(count or 0)  # also where none came: it may stop the copy
    return done


def _forgetting(report: Report, sources: list[int], target: int) -> Report:
    """Wrap a report so that it also keeps all files out of the page cache, a chunk behind what is done."""
    cached = 0

    def forget_behind(nbytes: int) -> None:
        nonlocal cached
        cached += nbytes
        if cached >= LOW_MEMORY_CHUNK_BYTES:
            cached = 0
            _forget(sources, target)
        report(nbytes)

    return forget_behind


def _forget(sources: list[int], target: int) -> None:
    for source in sources:
        forget(source)
    forget(target, written=True)
