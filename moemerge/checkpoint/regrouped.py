"""Rows of attention heads in another order: neighbours that rotate together, or the halves of what rotates."""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.files import Readable
from moemerge.checkpoint.header import TensorInfo


@dataclass(frozen=True, slots=True)
class Heads:
    """How many rows each head has, and how many of them rotate, counted from its first."""

    rows: int
    rotated: int
    into_pairs: bool = False
    """Whether a row of the first half comes before one of the second, and so on; else even rows before odd ones."""


class RegroupedReader:
    """A tensor's bytes with the rows of every head in another order; one head is in memory at a time."""

    def __init__(self, file: Readable, source: TensorInfo, heads: Heads, row_bytes: int) -> None:
        self._file, self._source = file, source
        half = heads.rotated // 2
        self._head = np.empty((heads.rows, row_bytes), np.uint8)
        turned = self._head[: heads.rotated]
        self._turned = turned.reshape((2, half, row_bytes) if heads.into_pairs else (half, 2, row_bytes))
        self._still = self._head[heads.rotated :]
        self._left = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int | None:
        """Read at most to the end of a head."""
        if not self._left:
            self._left = memoryview(self.next_head())
        count = min(len(view), len(self._left))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count

    def next_head(self) -> bytes:
        """Read the next head as a whole.

        Raises:
            CheckpointError: the file ends too early.
        """
        fill(self._file, self._head.reshape(-1).data, self._source)
        return self._turned.swapaxes(0, 1).tobytes() + self._still.tobytes()


@dataclass(frozen=True, repr=False)
class Regrouped(ComputedFile):
    """A tensor, the rows of whose heads are regrouped."""

    stored: TensorInfo
    """The tensor (row, ...) as it is stored; its rows are whole heads."""
    heads: Heads

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The tensor as it is stored."""
        return (self.stored,)

    @property
    def settings(self) -> tuple[object, ...]:
        """The order of the rows."""
        return (self.heads,)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.stored.nbytes

    def tensor(self) -> TensorInfo:
        """The result as a tensor, of the same name."""
        stored = self.stored
        return TensorInfo(stored.name, self, stored.dtype, stored.shape, 0, stored.nbytes)

    def blocks(self, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield whole heads, and parts of the first and the last one."""
        rows, row_bytes = self.heads.rows, self.stored.nbytes // self.stored.shape[0]
        head_bytes = rows * row_bytes
        first, last = start // head_bytes, -(-end // head_bytes)
        with self.stored.rows(first * rows, (last - first) * rows).open() as file:
            reader = RegroupedReader(file, self.stored, self.heads, row_bytes)
            for head in range(first, last):
                yield reader.next_head()[max(0, start - head * head_bytes) : end - head * head_bytes]
