"""Some columns of a stored matrix, cut out of its rows while it is read."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import numpy as np

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import bytes_of

_BLOCK_BYTES: Final = 2**23


@dataclass(frozen=True, repr=False)
class ColumnSlice(ComputedFile):
    """The columns `first` to `first + count` of a matrix.

    Raises:
        ValueError: the matrix has no such columns, or they do not begin and end with whole bytes.
    """

    stored: TensorInfo
    """The matrix (row, column)."""
    first: int
    count: int

    def __post_init__(self) -> None:
        if len(self.stored.shape) != 2 or not 0 <= self.first <= self.first + self.count <= self.stored.shape[1]:  # noqa: PLR2004
            raise ValueError(f"{self.stored.name}: no {self.count} columns from {self.first} on in {self.stored.shape}")
        if None in (self._bytes_of(self.first), self._bytes_of(self.count)):
            raise ValueError(f"{self.stored.name}: its columns are not whole bytes of {self.stored.dtype}")

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The matrix."""
        return (self.stored,)

    @property
    def settings(self) -> tuple[object, ...]:
        """The place of the columns."""
        return (self.first, self.count)

    @property
    def nbytes(self) -> int:
        """Size of the columns in bytes."""
        return self.stored.shape[0] * (self._bytes_of(self.count) or 0)

    def tensor(self) -> TensorInfo:
        """The columns as a tensor (row, count)."""
        stored = self.stored
        return TensorInfo(stored.name, self, stored.dtype, (stored.shape[0], self.count), 0, self.nbytes)

    def blocks(self, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield the columns of some rows at a time."""
        rows, width = self.stored.shape
        row_bytes, cut_bytes = self._bytes_of(width) or 1, self._bytes_of(self.count) or 1
        before = self._bytes_of(self.first) or 0
        step = max(1, _BLOCK_BYTES // row_bytes)
        first, last = start // cut_bytes, min(-(-end // cut_bytes), rows)
        with self.stored.rows(first, last - first).open() as reader:
            for row in range(first, last, step):
                block = np.empty((min(step, last - row), row_bytes), np.uint8)
                fill(reader, block.reshape(-1).data, self.stored)
                cut = block[:, before : before + cut_bytes].tobytes()
                yield cut[max(0, start - row * cut_bytes) : end - row * cut_bytes]

    def _bytes_of(self, columns: int) -> int | None:
        return bytes_of(self.stored.dtype, (columns,))
