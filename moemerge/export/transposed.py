"""A small matrix, such as one head's, that is transposed while it is read."""

from dataclasses import dataclass

import numpy as np

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.files import BlockReader, Reader
from moemerge.checkpoint.header import TensorInfo


@dataclass(frozen=True, eq=False)
class Transposed:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that holds the transpose of a matrix."""

    matrix: TensorInfo
    """The matrix (row, column); all of it is in memory at a time."""

    @property
    def name(self) -> str:
        """The name of the matrix's file."""
        return self.matrix.name

    @property
    def nbytes(self) -> int:
        """Size of the matrix in bytes."""
        return self.matrix.nbytes

    @property
    def identity(self) -> str:
        """A text of the matrix that it is the transpose of."""
        return repr(self.matrix)

    def tensor(self) -> TensorInfo:
        """The transpose (column, row)."""
        return TensorInfo(self.name, self, self.matrix.dtype, self.matrix.shape[::-1], 0, self.nbytes)

    def keep(self, folder: object, start: int, nbytes: int) -> None:
        """Do nothing: the transpose is computed from another file."""

    def open(self, start: int, nbytes: int) -> Reader:
        """Read the matrix, and open `nbytes` bytes of the transpose from offset `start` on.

        Raises:
            CheckpointError: the matrix differs from its header.
        """
        rows, columns = self.matrix.shape
        stored = np.empty((rows, columns, self.nbytes // (rows * columns)), np.uint8)
        with self.matrix.open() as reader:
            fill(reader, stored.reshape(-1).data, self.matrix)
        data = stored.swapaxes(0, 1).tobytes()[start : start + nbytes]
        return BlockReader(block for block in (data,))
