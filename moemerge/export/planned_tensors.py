"""Tensors of a checkpoint that is not written, as files whose bytes a merge makes while they are read."""

from collections.abc import Generator
from dataclasses import dataclass, replace

from moemerge.checkpoint.bands import band_chunks
from moemerge.checkpoint.files import BlockReader, Reader, clipped
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Piece, band_bytes, with_seeds
from moemerge.dtypes import HeaderDType, bytes_of


@dataclass(frozen=True, eq=False)
class Planned:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that holds one tensor of a merge, made of its bands."""

    name: str
    """Name of the tensor in the checkpoint, on which the noise of its pieces depends."""
    dtype: HeaderDType
    shape: tuple[int, ...]
    bands: tuple[Band, ...]
    """The tensor's bands; empty until a tensor that is computed later is there."""
    seed: int
    """The seed of the noise."""

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return bytes_of(self.dtype, self.shape) or 0

    @property
    def identity(self) -> str:
        """A text of what the tensor is made of."""
        return repr((self.name, self.seed, self.bands))

    def tensor(self) -> TensorInfo:
        """The tensor; if it is one unchanged piece, that piece's source, which the kernel can copy."""
        match self.bands:
            case ((Piece(source=TensorInfo() as source, is_unchanged=True),),):
                return replace(source, shape=self.shape)
        return TensorInfo(self.name, self, self.dtype, self.shape, 0, self.nbytes)

    def keep(self, folder: object, start: int, nbytes: int) -> None:
        """Do nothing: the tensor is computed from other files."""

    def open(self, start: int, nbytes: int) -> Reader:
        """Open `nbytes` bytes from offset `start` on; reading may raise what reading the pieces does."""
        return BlockReader(self._chunks(start, start + nbytes))

    def _chunks(self, start: int, end: int) -> Generator[memoryview, None, None]:
        done = 0
        for band, seeds in with_seeds(self.bands, self.seed, self.name):
            nbytes = band_bytes(band)
            if done < end and start < done + nbytes:
                yield from clipped(band_chunks(band, seeds), start - done, end - done)
            done += nbytes


def waits(bands: tuple[Band, ...]) -> bool:
    """Whether any of the pieces is part of a planned tensor that is computed later."""
    sources = [piece.source for band in bands for piece in band]
    files = [source.path for source in sources if isinstance(source, TensorInfo)]
    return any(isinstance(file, Planned) and not file.bands for file in files)
