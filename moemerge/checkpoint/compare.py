"""Compare stored bytes with what a merge would write: two streams, one bounded chunk of each at a time."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moemerge.checkpoint.bands import tensor_chunks
from moemerge.checkpoint.copy import Report
from moemerge.checkpoint.files import File, Readable
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band
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


def compare_tensor(
    bands: tuple[Band, ...],
    seed: int,
    found: TensorInfo,
    report: Report,
    *,
    look: Callable[[memoryview], None] = lambda _: None,
) -> Unequal | None:
    """Compare a stored tensor with what a merge makes of its pieces; None where they are equal.

    Args:
        bands: the pieces of the tensor.
        seed: the seed of the noise.
        found: the stored tensor: as many bytes as the pieces, under the name that the merge gives them.
        report: called with the number of bytes compared.
        look: called with the bytes of `found`, in their order and in whole numbers; valid until the next.

    Raises:
        CheckpointError: `found` or a source cannot be read.
    """
    try:
        with found.open() as reader:
            expected = tensor_chunks(bands, seed, found.name)
            return _compare(expected, reader, found.path, found.nbytes, report, look=look)
    except OSError as error:
        raise CheckpointError(
            f"{found.path}: tensor {found.name!r} cannot be compared with its source: {error.strerror or error}."
        ) from error


def compare_files(expected: Path, found: Path) -> str | None:
    """Say in words how a file differs from another; None where they are equal.

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


def _compare(
    expected: Iterable[bytearray | memoryview],
    found: Readable,
    file: File,
    nbytes: int,
    report: Report,
    *,
    look: Callable[[memoryview], None] = lambda _: None,
) -> Unequal | None:
    first, count, done = 0, 0, 0
    buffer = bytearray()
    for chunk in expected:
        size = len(chunk)
        if len(buffer) != size:
            buffer = bytearray(size)
        _fill(found, memoryview(buffer), file)
        look(memoryview(buffer))
        if buffer != chunk:  # in this order: a bytearray compares whole blocks of memory, a view byte by byte
            changed = (int.from_bytes(chunk, "little") ^ int.from_bytes(buffer, "little")).to_bytes(size, "little")
            if not count:
                first = done + size - len(changed.lstrip(b"\0"))
            count += size - changed.count(0)
        done += size
        report(size)
    return Unequal(count, nbytes, first) if count else None


def _read(stream: Readable, nbytes: int, file: File) -> bytearray:
    data = bytearray(nbytes)
    _fill(stream, memoryview(data), file)
    return data


def _fill(stream: Readable, view: memoryview, file: File) -> None:
    while view:
        count = stream.readinto(view)
        if count == 0:
            raise CheckpointError(f"{file}: ended while it was compared: was it changed meanwhile?")
        view = view[count or 0 :]
