"""Filling output files from their sources: headers first, then every tensor's bytes by a few threads."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from moemerge.checkpoint.convert import convert, ended_inside
from moemerge.checkpoint.copy import Report, copy_range, write_all, write_failure
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.jobs import run_jobs
from moemerge.checkpoint.shards import Shard

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
    run_jobs(
        [
            partial(_write_piece, pieces[name], folder / shard.name, start, noise_seed(seed, name))
            for shard in shards
            for name, start in shard.starts.items()
        ],
        report,
    )


def convert_piece(piece: Piece, source: StoredTensor, target: int, seed: str, report: Report) -> None:
    """Write what becomes of a piece's source, which is not copied as it is, at the target's position.

    Raises:
        CheckpointError: the source is not what its header said, or a finite weight is infinite in the piece's dtype.
    """
    with source.path.open("rb", buffering=0) as file:
        convert(file, source, target, piece.dtype, report, scale=piece.scale, noise_scale=piece.noise_scale, seed=seed)


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
    source = piece.source
    target = os.open(path, os.O_WRONLY | _BINARY)
    try:
        if isinstance(source, bytes):
            os.lseek(target, start, os.SEEK_SET)
            write_all(target, source)
            report(len(source))
        elif piece.is_unchanged:
            with source.path.open("rb", buffering=0) as file:
                copied = copy_range(file.fileno(), source.start, target, start, source.nbytes, report)
            if copied < source.nbytes:
                raise ended_inside(source)
        else:
            os.lseek(target, start, os.SEEK_SET)
            convert_piece(piece, source, target, seed, report)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        os.close(target)
