"""A matrix that is transposed while it is read."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.files import BlockReader, Reader, fingerprint_of
from moemerge.checkpoint.header import TensorInfo

_BLOCK_BYTES: Final = 4_000_000


@dataclass(frozen=True, eq=False)
class Transposed:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that holds the transpose of a matrix."""

    matrix: TensorInfo
    """The matrix (row, column); all of it is in memory at a time."""

    def __repr__(self) -> str:
        return str(self.matrix.path)

    @property
    def name(self) -> str:
        """The name of the matrix's file."""
        return self.matrix.path.name

    @property
    def nbytes(self) -> int:
        """Size of the matrix in bytes."""
        return self.matrix.nbytes

    @property
    def identity(self) -> str:
        """A text of the matrix that it is the transpose of."""
        return repr((self.matrix, fingerprint_of(self.matrix.path)))

    def tensor(self) -> TensorInfo:
        """The transpose (column, row), by the matrix's name."""
        return TensorInfo(self.matrix.name, self, self.matrix.dtype, self.matrix.shape[::-1], 0, self.nbytes)

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Keep the whole matrix, whatever range is given."""
        del start, nbytes
        self.matrix.keep(folder)

    def open(self, start: int, nbytes: int) -> Reader:
        """Open `nbytes` bytes of the transpose from offset `start` on; reading raises what reading the matrix does."""
        return BlockReader(self._blocks(start, start + nbytes))

    def _blocks(self, start: int, end: int) -> Generator[bytes | memoryview, None, None]:
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
