"""Rows of heads in the order of transformers, read from a tensor in which llama.cpp has put them into pairs."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.files import BlockReader, Reader, fingerprint_of
from moemerge.checkpoint.header import TensorInfo

_BLOCK_BYTES: Final = 2**21


@dataclass(frozen=True)
class HeadRows:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that holds one tensor: of each head, even rows before odd ones.

    Rotary positions turn row `i` of a head with row `i + head_rows / 2` in transformers, and with its neighbour in
    files of llama.cpp.
    """

    stored: TensorInfo
    """The tensor with neighbouring pairs."""
    head_rows: int
    """Rows of each head, an even number that divides the tensor's rows."""

    def __str__(self) -> str:
        return str(self.stored.path)

    @property
    def name(self) -> str:
        """The name of the tensor's file."""
        return self.stored.path.name

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.stored.nbytes

    @property
    def identity(self) -> str:
        """The rows of a head, and the place of the tensor and its file's fingerprint, as text."""
        return repr((self.head_rows, repr(self.stored), fingerprint_of(self.stored.path)))

    def tensor(self) -> TensorInfo:
        """The tensor in order."""
        stored = self.stored
        return TensorInfo(stored.name, self, stored.dtype, stored.shape, 0, stored.nbytes)

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Keep the whole tensor, whatever range is given."""
        del start, nbytes
        self.stored.keep(folder)

    def open(self, start: int, nbytes: int) -> Reader:
        """Open `nbytes` bytes from offset `start` on; whole heads are read.

        Raises:
            CheckpointError: when it is read: the file ends too early.
        """
        return BlockReader(self._chunks(start, start + nbytes))

    def _chunks(self, start: int, end: int) -> Generator[bytes, None, None]:
        row_bytes = self.stored.nbytes // self.stored.shape[0]
        head_bytes = self.head_rows * row_bytes
        first, last = start // head_bytes, -(-end // head_bytes)
        step = max(1, _BLOCK_BYTES // head_bytes)
        rows = self.stored.rows(first * self.head_rows, (last - first) * self.head_rows)
        with rows.open() as reader:
            for head in range(first, last, step):
                heads = np.empty((min(step, last - head), self.head_rows // 2, 2, row_bytes), np.uint8)
                fill(reader, heads.reshape(-1).data, rows)
                data = heads.swapaxes(1, 2).tobytes()
                yield data[max(0, start - head * head_bytes) : end - head * head_bytes]
