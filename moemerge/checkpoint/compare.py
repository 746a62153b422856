"""Stored bytes compared with what a merge would write: two streams, one bounded chunk of each at a time."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from moemerge.checkpoint.copy import Report
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.stored import float32_of
from moemerge.checkpoint.writer import Piece, convert_piece
from moemerge.dtypes import NAMED
from moemerge.errors import CheckpointError

CHUNK_BYTES: Final = 2**20


def compare_tensor(piece: Piece, source: StoredTensor, seed: str, found: StoredTensor, report: Report) -> str | None:
    """How a stored tensor differs from what a merge makes of `source`; None where they are equal.

    Args:
        piece: how the source becomes the output: copied as it is, or converted.
        source: the piece's source.
        seed: of the noise.
        found: as many bytes as the output has.
        report: called with the number of bytes compared.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    try:
        with _expected(piece, source, seed) as expected, found.path.open("rb") as file:
            file.seek(found.start)
            return _compare_streams(expected, file, found.nbytes, report)
    except OSError as error:
        raise CheckpointError(
            f"{found.path}: tensor {found.name!r} cannot be compared with {source.path}: {error.strerror or error}."
        ) from error


def compare_files(expected: Path, found: Path) -> str | None:
    """How a file differs from another; None where they are equal.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    try:
        with expected.open("rb") as one, found.open("rb") as other:
            sizes = [os.fstat(file.fileno()).st_size for file in (one, other)]
            if sizes[0] != sizes[1]:
                return f"{sizes[1]} bytes instead of {sizes[0]}"
            return _compare_streams(one, other, sizes[0], lambda _: None)
    except OSError as error:
        raise CheckpointError(f"{found}: cannot be compared with {expected}: {error.strerror or error}.") from error


def count_not_finite(tensor: StoredTensor, report: Report) -> int:
    """How many of a tensor's values are infinite or not a number.

    Raises:
        CheckpointError: it cannot be read.
    """
    count = done = 0
    try:
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            while done < tensor.nbytes:
                chunk = _read(file, min(CHUNK_BYTES, tensor.nbytes - done))
                count += int((~np.isfinite(float32_of(chunk, NAMED[tensor.dtype]))).sum())
                done += len(chunk)
                report(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror or error}.") from error
    return count


@contextmanager
def _expected(piece: Piece, source: StoredTensor, seed: str) -> Iterator[BinaryIO]:
    """What a merge would write, as a stream."""
    if piece.is_unchanged:
        with source.path.open("rb") as file:
            file.seek(source.start)
            yield file
        return
    # A pipe holds the converting thread back, so that no more than its chunk is ever in memory or on disk.
    reading, writing = os.pipe()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(_convert_into, writing, piece, source, seed)
        try:
            with os.fdopen(reading, "rb") as stream:
                yield stream
        finally:
            job.result()  # why the stream ended early is said here


def _convert_into(target: int, piece: Piece, source: StoredTensor, seed: str) -> None:
    # A pipe that breaks belongs to a comparison that was stopped, which has its own reason.
    with os.fdopen(target, "wb", buffering=0), suppress(BrokenPipeError):
        convert_piece(piece, source, target, seed, lambda _: None)


def _compare_streams(expected: BinaryIO, found: BinaryIO, nbytes: int, report: Report) -> str | None:
    first, count, done = 0, 0, 0
    while done < nbytes:
        size = min(CHUNK_BYTES, nbytes - done)
        one, other = _read(expected, size), _read(found, size)
        if one != other:
            changed = (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(size, "little")
            if not count:
                first = done + size - len(changed.lstrip(b"\0"))
            count += size - changed.count(0)
        done += size
        report(size)
    return f"{count} of {nbytes} bytes differ, the first at byte {first}" if count else None


def _read(stream: BinaryIO, nbytes: int) -> bytes:
    data = stream.read(nbytes)
    if len(data) < nbytes:
        raise CheckpointError(f"{stream.name}: ended while it was compared: was it changed meanwhile?")
    return data
