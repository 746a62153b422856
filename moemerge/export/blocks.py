"""Numbers as GGUF files store them: floats, and blocks of bytes that share a scale."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.bands import tensor_chunks
from moemerge.checkpoint.files import BlockReader, Reader, clipped
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, measure
from moemerge.dtypes import HeaderDType

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""The type of a file's matrices, as llama.cpp's converter spells it."""
FLOATS: Final[dict[str, HeaderDType]] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""Map from a type of plain floats to its name in a safetensors header."""
BLOCK_ELEMENTS: Final = 32
_BLOCK_BYTES: Final = 2 + BLOCK_ELEMENTS
_LARGEST: Final = 127


def quantise_q8_0(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode numbers as blocks (block, 34) of 32 each: a float16 scale (their largest through 127), then 32 int8.

    Everything is computed in float32 and rounded half away from zero, as in ggml's reference.
    """
    blocks = numbers.reshape(-1, BLOCK_ELEMENTS)
    # numpy takes four times as long for the maximum of many short rows as for that of a few long ones.
    scales = np.abs(np.ascontiguousarray(blocks.T)).max(axis=0) / np.float32(_LARGEST)
    inverse = np.zeros_like(scales)
    # Numbers whose block has too small a scale become 0, as the scale does in float16.
    np.divide(np.float32(1), scales, out=inverse, where=scales > np.finfo(np.float32).tiny)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite stays so
        rest = blocks * inverse[:, None]
        # Half away from zero; numpy rounds half to even.
        whole = np.trunc(rest)
        rest -= whole
        rest *= 2
        whole += np.trunc(rest, out=rest)
        small, bits = scales.astype("<f2"), whole.astype(np.int8)
    stored = np.empty((len(blocks), _BLOCK_BYTES), np.uint8)
    stored[:, :2] = small[:, None].view(np.uint8)
    stored[:, 2:] = bits.view(np.uint8)
    return stored


@dataclass(frozen=True, eq=False)
class Quantised:
    """A file (`moemerge.checkpoint.files.RemoteFile`) of blocks, made of a tensor's float32 bands while it is read."""

    name: str
    bands: tuple[Band, ...]
    """Bands of float32; every row is a multiple of 32 numbers long."""

    @property
    def nbytes(self) -> int:
        """Size of all blocks in bytes."""
        return measure(self.bands) // (4 * BLOCK_ELEMENTS) * _BLOCK_BYTES

    @property
    def identity(self) -> str:
        """A text of what the blocks are made of."""
        return repr(self.bands)

    def tensor(self) -> TensorInfo:
        """All blocks, as a tensor of bytes."""
        return TensorInfo(self.name, self, "U8", (self.nbytes,), 0, self.nbytes)

    def keep(self, folder: object, start: int, nbytes: int) -> None:
        """Do nothing: the blocks are computed from other files."""

    def open(self, start: int, nbytes: int) -> Reader:
        """Open `nbytes` bytes of blocks from offset `start` on; reading may raise what reading the bands does."""
        return BlockReader(chunk for chunk in clipped(self._blocks(), start, start + nbytes))

    def _blocks(self) -> Iterator[memoryview]:
        for chunk in tensor_chunks(self.bands, 0, self.name):
            yield memoryview(quantise_q8_0(np.frombuffer(chunk, np.float32)).reshape(-1).data)
