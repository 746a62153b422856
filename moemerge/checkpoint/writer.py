"""Filling output files from their sources: headers first, then every tensor's bytes by a few threads."""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moemerge.checkpoint.convert import convert, ended_inside
from moemerge.checkpoint.copy import Report, copy_range, write_all, write_failure
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.shards import Shard

# Kernel copies wait for the disk, not the processor: more threads than this queue behind each other.
MAX_THREADS: Final = 4
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


def write_shards(folder: Path, shards: Sequence[Shard], pieces: Mapping[str, Piece], seed: int, report: Report) -> None:
    """Write every shard into `folder`, each preallocated to its final size.

    Args:
        folder: an existing folder; files in it are overwritten.
        shards: what to write where.
        pieces: for each tensor of the shards, where its bytes come from.
        seed: of the noise.
        report: called with the number of bytes written, from one thread at a time.

    Raises:
        CheckpointError: a source is not what its header said.
        OutputError: the disk is full or cannot be written.
    """
    for shard in shards:
        _create(folder / shard.name, shard)
    stop = threading.Event()
    lock = threading.Lock()

    def report_or_stop(nbytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            report(nbytes)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(_write_piece, pieces[name], folder / shard.name, start, f"{seed} {name}", report_or_stop)
            for shard in shards
            for name, start in shard.starts.items()
        ]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            failures = [error for job in done if (error := job.exception()) and not isinstance(error, _StoppedError)]
            if failures:
                raise failures[0]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _create(path: Path, shard: Shard) -> None:
    try:
        with path.open("wb") as file:
            file.write(shard.header)
            file.flush()
            _preallocate(file.fileno(), shard.nbytes)
    except OSError as error:
        raise write_failure(path, error) from error


def _preallocate(file: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError:
            pass  # not every file system can; a full disk shows below or at the first byte
        else:
            return
    os.ftruncate(file, nbytes)


def _write_piece(piece: Piece, path: Path, start: int, seed: str, report: Report) -> None:
    target = os.open(path, os.O_WRONLY | _BINARY)
    try:
        if isinstance(piece.source, bytes):
            os.lseek(target, start, os.SEEK_SET)
            write_all(target, piece.source)
            report(len(piece.source))
            return
        with piece.source.path.open("rb", buffering=0) as source:
            if piece.is_unchanged:
                copied = copy_range(source.fileno(), piece.source.start, target, start, piece.source.nbytes, report)
                if copied < piece.source.nbytes:
                    raise ended_inside(piece.source)
            else:
                os.lseek(target, start, os.SEEK_SET)
                convert(
                    source, piece.source, target, piece.dtype, report,
                    scale=piece.scale, noise_scale=piece.noise_scale, seed=seed,
                )  # fmt: skip
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        os.close(target)
