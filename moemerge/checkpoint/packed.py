"""Tensors of an archive whose bytes are not stored plainly row by row: compressed, in another order, or negated."""

import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.files import BlockReader, Reader, fingerprint_of, size_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import BITS, bytes_of
from moemerge.errors import CheckpointError

# Bytes reordered at once: each block of rows of a transposed matrix reads all of it.
_BLOCK_BYTES: Final = 2**24
# Bytes read at once and thinned out afterwards, where one number in so many is needed or the whole is small.
_SPAN_ELEMENTS: Final = 2**21
_SPARSE: Final = 16
_SMALL: Final = 2**14

Numbers = NDArray[Any]
"""Numbers of any type of the right width: they are moved without being interpreted."""


@dataclass(frozen=True)
class Packed:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that holds one tensor, unpacked while it is read, in blocks."""

    stored: TensorInfo
    """The record of the archive, with the tensor's dtype and shape; a compressed one has other bytes."""
    offset: int
    """Position of the tensor's first number in the record, in numbers."""
    strides: tuple[int, ...]
    """Steps from a number to the next along each axis, in numbers."""
    negated: bool
    checksum: int | None
    """Checksum of a compressed record's bytes; None where the record is stored as it is."""
    record_bytes: int
    """Size of the decompressed record in bytes."""

    def __str__(self) -> str:
        return str(self.stored.path)

    @property
    def name(self) -> str:
        """The archive's name."""
        return self.stored.path.name

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return bytes_of(self.stored.dtype, self.stored.shape) or 0

    @property
    def identity(self) -> str:
        """How the numbers lie in the record, and the fingerprint of the archive's content, as text."""
        return repr(
            (self.offset, self.strides, self.negated, size_of(self.stored.path), fingerprint_of(self.stored.path))
        )

    def tensor(self) -> TensorInfo:
        """The unpacked tensor."""
        stored = self.stored
        return TensorInfo(stored.name, self, stored.dtype, stored.shape, 0, self.nbytes)

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Do nothing: the archive is on this machine."""

    def open(self, start: int, nbytes: int) -> Reader:
        """Open the unpacked tensor for reading `nbytes` bytes from offset `start` on.

        Raises:
            CheckpointError: when it is read: the archive cannot be read, or ends too early.
        """
        return BlockReader(self._chunks(start, start + nbytes))

    def _chunks(self, start: int, end: int) -> Generator[memoryview, None, None]:
        width = BITS[self.stored.dtype] // 8
        try:
            with self._record() as record:
                for number, block in self._blocks(record, start // width, -(-end // width)):
                    yield block[max(0, start - number * width) : end - number * width]
        except (zlib.error, zipfile.BadZipFile, EOFError, OSError) as error:
            raise CheckpointError(
                f"{self}: tensor {self.stored.name!r} cannot be read ({error}). Download the file again."
            ) from error

    @contextmanager
    def _record(self) -> Iterator[Any]:
        """A context with the record open for reading and seeking."""
        with Path(str(self)).open("rb", buffering=0) as file:
            if self.checksum is None:
                yield file
                return
            file.seek(self.stored.start)
            info = zipfile.ZipInfo()
            info.compress_type, info.CRC = zipfile.ZIP_DEFLATED, self.checksum
            info.compress_size, info.file_size = self.stored.nbytes, self.record_bytes
            with zipfile.ZipExtFile(file, "r", info) as record:
                yield record

    def _blocks(self, record: Any, first: int, end: int) -> Iterator[tuple[int, memoryview]]:
        """Yield the numbers from `first` to `end`, and some around them: the offset of each block, and its bytes."""
        shape, strides = self.stored.shape or (1,), self.strides or (1,)
        elements = _BLOCK_BYTES * 8 // BITS[self.stored.dtype]
        axis = next(axis for axis in range(len(shape)) if prod(shape[axis + 1 :]) <= elements)
        inner = prod(shape[axis + 1 :])
        step = elements // inner
        for number, outer in enumerate(product(*map(range, shape[:axis]))):
            begin = number * shape[axis] * inner
            last = min(shape[axis], -(-(end - begin) // inner))
            for row in range(max(0, (first - begin) // inner), last, step):
                block = np.empty((min(step, last - row), *shape[axis + 1 :]), f"u{BITS[self.stored.dtype] // 8}")
                offset = self.offset + sum(i * s for i, s in zip((*outer, row), strides, strict=False))
                self._gather(record, offset, strides[axis:], block)
                stored = block.reshape(-1, 1).view(np.uint8)
                if self.negated:
                    stored[:, -1] ^= 0x80  # the sign of little-endian floats
                yield begin + row * inner, stored.reshape(-1).data

    def _gather(self, record: Any, offset: int, strides: tuple[int, ...], target: Numbers) -> None:
        """Fill `target` with numbers that lie `strides` apart: read everything between them, or split into halves."""
        reach = [(size - 1) * stride for size, stride in zip(target.shape, strides, strict=True)]
        span = sum(reach) + 1
        if span <= _SMALL or span <= min(_SPAN_ELEMENTS, _SPARSE * target.size):
            read = np.empty(span, target.dtype)
            record.seek(offset * target.itemsize + (self.stored.start if self.checksum is None else 0))
            fill(record, read.view(np.uint8).data, self.stored)
            target[...] = as_strided(read, target.shape, [stride * target.itemsize for stride in strides])
            return
        axis = reach.index(max(reach))
        half = target.shape[axis] // 2
        lower, upper = np.split(target, [half], axis)
        self._gather(record, offset, strides, lower)
        self._gather(record, offset + half * strides[axis], strides, upper)


def notes_on(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Yield a note for each file in a table that holds packed tensors."""
    files: dict[str, list[Packed]] = {}
    for tensor in tensors.values():
        if isinstance(tensor.path, Packed):
            files.setdefault(tensor.path.name, []).append(tensor.path)
    for name, found in files.items():
        ordered = [packed for packed in found if packed.checksum is None]
        if len(ordered) < len(found):
            yield (
                f"{name} is compressed, and decompressed while it is read; transformers takes the compressed bytes for "
                "numbers"
            )
        if ordered:
            yield (
                f"{len(ordered)} tensors of {name}, such as {ordered[0].stored.name}, do not lie row by row as they "
                "are, and are put in order while they are read"
            )
