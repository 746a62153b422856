"""Stored bytes compared with what a merge would write: two streams, one bounded chunk of each at a time."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from moemerge.checkpoint.bands import tensor_chunks
from moemerge.checkpoint.copy import Report
from moemerge.checkpoint.files import File, Readable, read_exactly
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.stored import float32_of
from moemerge.dtypes import NAMED
from moemerge.errors import CheckpointError

CHUNK_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Unequal:
    """How many bytes differ, and where the first one is."""

    count: int
    nbytes: int
    first: int

    def __str__(self) -> str:
        return f"{self.count} of {self.nbytes} bytes differ, the first at byte {self.first}"


def compare_tensor(bands: tuple[Band, ...], seed: int, found: StoredTensor, report: Report) -> Unequal | None:
    """How a stored tensor differs from what a merge makes of its pieces; None where they are equal.

    Args:
        bands: the pieces.
        seed: of the noise.
        found: as many bytes as the pieces, under the name that the merge gives them.
        report: called with the number of bytes compared.

    Raises:
        CheckpointError: `found` or a source cannot be read.
    """
    try:
        with found.open() as reader:
            return _compare(tensor_chunks(bands, seed, found.name), reader, found.path, found.nbytes, report)
    except OSError as error:
        raise CheckpointError(
            f"{found.path}: tensor {found.name!r} cannot be compared with its source: {error.strerror or error}."
        ) from error


def compare_files(expected: Path, found: Path) -> str | None:
    """How a file differs from another; None where they are equal.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    try:
        with expected.open("rb", buffering=0) as one, found.open("rb", buffering=0) as other:
            sizes = [os.fstat(file.fileno()).st_size for file in (one, other)]
            if sizes[0] != sizes[1]:
                return f"{sizes[1]} bytes instead of {sizes[0]}"
            steps = (min(CHUNK_BYTES, sizes[0] - start) for start in range(0, sizes[0], CHUNK_BYTES))
            unequal = _compare((_read(one, step, expected) for step in steps), other, found, sizes[0], lambda _: None)
            return str(unequal) if unequal else None
    except OSError as error:
        raise CheckpointError(f"{found}: cannot be compared with {expected}: {error.strerror or error}.") from error


def count_not_finite(tensor: StoredTensor, report: Report) -> int:
    """How many of a tensor's values are infinite or not a number.

    Raises:
        CheckpointError: it cannot be read.
    """
    count = done = 0
    try:
        with tensor.open() as reader:
            while done < tensor.nbytes:
                chunk = _read(reader, min(CHUNK_BYTES, tensor.nbytes - done), tensor.path)
                count += int((~np.isfinite(float32_of(chunk, NAMED[tensor.dtype]))).sum())
                done += len(chunk)
                report(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror or error}.") from error
    return count


def _compare(
    expected: Iterable[bytes | memoryview], found: Readable, file: File, nbytes: int, report: Report
) -> Unequal | None:  # fmt: skip
    first, count, done = 0, 0, 0
    for chunk in expected:
        size = len(chunk)
        one, other = bytes(chunk), _read(found, size, file)
        if one != other:
            changed = (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(size, "little")
            if not count:
                first = done + size - len(changed.lstrip(b"\0"))
            count += size - changed.count(0)
        done += size
        report(size)
    return Unequal(count, nbytes, first) if count else None


def _read(stream: Readable, nbytes: int, file: File) -> bytes:
    data = read_exactly(stream, nbytes)
    if len(data) < nbytes:
        raise CheckpointError(f"{file}: ended while it was compared: was it changed meanwhile?")
    return data
