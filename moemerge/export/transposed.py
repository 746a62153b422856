"""A matrix with its axes exchanged while it is read: one that is small, as a head's."""

from dataclasses import dataclass

import numpy as np

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.files import BlockReader, Reader
from moemerge.checkpoint.header import TensorInfo


@dataclass(frozen=True, eq=False)
class Transposed:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that holds the transpose of a matrix."""

    matrix: TensorInfo
    """(row, column); all of it is in memory at a time."""

    @property
    def name(self) -> str:
        """Of the matrix."""
        return self.matrix.name

    @property
    def nbytes(self) -> int:
        """Of the matrix."""
        return self.matrix.nbytes

    @property
    def identity(self) -> str:
        """What it is the transpose of."""
        return repr(self.matrix)

    def tensor(self) -> TensorInfo:
        """The transpose (column, row)."""
        return TensorInfo(self.name, self, self.matrix.dtype, self.matrix.shape[::-1], 0, self.nbytes)

    def keep(self, folder: object, start: int, nbytes: int) -> None:
        """It is made of what is elsewhere."""

    def open(self, start: int, nbytes: int) -> Reader:
        """Read the matrix, and give `nbytes` bytes of the transpose from offset `start` on.

        Raises:
            CheckpointError: the matrix is not what its header said.
        """
        rows, columns = self.matrix.shape
        stored = np.empty((rows, columns, self.nbytes // (rows * columns)), np.uint8)
        with self.matrix.open() as reader:
            fill(reader, stored.reshape(-1).data, self.matrix)
        data = stored.swapaxes(0, 1).tobytes()[start : start + nbytes]
        return BlockReader(block for block in (data,))
