"""A matrix that is transposed while it is read."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import numpy as np

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.header import TensorInfo

_BLOCK_BYTES: Final = 4_000_000


@dataclass(frozen=True, eq=False, repr=False)
class Transposed(ComputedFile):
    """The transpose of a matrix."""

    matrix: TensorInfo
    """The matrix (row, column); all of it is in memory at a time."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The matrix."""
        return (self.matrix,)

    @property
    def settings(self) -> tuple[object, ...]:
        """None: there is one way to transpose."""
        return ()

    @property
    def nbytes(self) -> int:
        """Size of the matrix in bytes."""
        return self.matrix.nbytes

    def tensor(self) -> TensorInfo:
        """The transpose (column, row), by the matrix's name."""
        return TensorInfo(self.matrix.name, self, self.matrix.dtype, self.matrix.shape[::-1], 0, self.nbytes)

    def blocks(self, start: int, end: int) -> Generator[bytes | memoryview, None, None]:
        """Yield some rows of the transpose at a time; the matrix is read whole before the first."""
        rows, columns = self.matrix.shape
        row_bytes = max(self.nbytes // max(columns, 1), 1)
        stored = np.empty((rows, columns, row_bytes // max(rows, 1)), np.uint8)
        with self.matrix.open() as reader:
            fill(reader, stored.reshape(-1).data, self.matrix)
        step = max(1, _BLOCK_BYTES // row_bytes)
        for row in range(start // row_bytes, -(-end // row_bytes), step):
            block = memoryview(stored[:, row : row + step].swapaxes(0, 1).tobytes())
            begin = row * row_bytes
            yield block[max(start - begin, 0) : end - begin]
