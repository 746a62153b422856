"""The structure of an output tensor: pieces side by side make a band, stacked bands make the tensor."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.packed import Packed
from moemerge.dtypes import BITS, HeaderDType, bytes_of


@dataclass(frozen=True, slots=True)
class Fill:
    """A block filled with one number."""

    value: float
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of an output tensor: `(source + noise_scale * N(0, 1)) * scale` as `dtype`.

    Source bytes (`bytes`) are written as they are and count as one column; a `Fill` has no noise and no scale.

    Raises:
        ValueError: the source's rows cannot be regrouped by `head_rows`.
    """

    source: TensorInfo | Fill | bytes
    dtype: HeaderDType
    """Dtype in the output, as a safetensors header spells it: `BF16`."""
    scale: float = 1.0
    noise_scale: float = 0.0
    head_rows: int = 0
    """If positive, every so many rows are regrouped: even rows first, then odd ones. Noise is added afterwards."""
    into_pairs: bool = False
    """Whether `head_rows` regroups the other way round: a row of the first half, then one of the second, and so on."""
    rotated_rows: int = 0
    """If positive, only so many rows at the beginning of every `head_rows` are regrouped; the others stay."""

    def __post_init__(self) -> None:
        if self.head_rows and (
            not isinstance(self.source, TensorInfo)
            or self.head_rows < 0
            or (self.rotated_rows or self.head_rows) % 2
            or not 0 <= self.rotated_rows <= self.head_rows
            or self.rows % self.head_rows
        ):
            raise ValueError(f"{self.source!r:.200}: its rows cannot be regrouped by {self.head_rows}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the source, which is that of the block."""
        if isinstance(self.source, bytes):
            return (len(self.source) * 8 // BITS[self.dtype],)
        return self.source.shape

    @property
    def rows(self) -> int:
        """Number of rows: the product of all axes but the last; each element of a vector is a row."""
        return math.prod(self.shape[:-1] if self._has_columns else self.shape)

    @property
    def width(self) -> int:
        """Elements in a row: the last axis; 1 for a vector."""
        return self.shape[-1] if self._has_columns else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the output.

        Raises:
            ValueError: its bits do not fill whole bytes.
        """
        return _bytes_of(self.dtype, (self.width,))

    @property
    def nbytes(self) -> int:
        """Bytes of the piece in the output.

        Raises:
            ValueError: its bits do not fill whole bytes.
        """
        return _bytes_of(self.dtype, self.shape)

    @property
    def changes_values(self) -> bool:
        """Whether the written numbers, or their bits, differ from the source's."""
        return isinstance(self.source, TensorInfo) and (
            self.source.dtype != self.dtype or self.scale != 1.0 or self.noise_scale != 0.0
        )

    @property
    def is_unchanged(self) -> bool:
        """Whether the output has the bytes of a source's file in their order, so that the kernel can copy them."""
        if isinstance(self.source, TensorInfo) and isinstance(self.source.path, ComputedFile | Packed):
            return False
        return not isinstance(self.source, Fill) and not self.changes_values and not self.head_rows

    @property
    def _has_columns(self) -> bool:
        return len(self.shape) > 1


Band = tuple[Piece, ...]
"""Pieces side by side, with equally many rows; a band of one piece is a contiguous range of bytes."""


def measure(bands: tuple[Band, ...]) -> int:
    """Count the bytes that the tensor takes.

    Raises:
        ValueError: the pieces do not fit together.
    """
    if len({piece.dtype for band in bands for piece in band}) > 1:
        raise ValueError("the pieces of a tensor differ in their dtypes")
    total = 0
    for band in bands:
        if not band or len({piece.rows for piece in band}) > 1:
            raise ValueError(f"pieces of {[piece.rows for piece in band]} rows cannot lie side by side")
        # Rows that lie side by side have to begin and end on whole bytes.
        total += band_bytes(band) if len(band) == 1 else band[0].rows * sum(piece.row_bytes for piece in band)
    return total


def band_bytes(band: Band) -> int:
    """Count the bytes that a band takes."""
    return sum(piece.nbytes for piece in band)


def with_seeds(bands: tuple[Band, ...], seed: int, name: str) -> Iterator[tuple[Band, list[str]]]:
    """Yield each band of the output tensor `name` with the noise seed of each of its pieces.

    All seeds are different: two experts made of one model get different noise, and so do two pieces of a tensor.
    """
    number = 0
    for band in bands:
        places = range(number, number + len(band))
        yield band, [f"{seed} {name} {place}" if place else f"{seed} {name}" for place in places]
        number += len(band)


def piece_at(bands: tuple[Band, ...], offset: int) -> tuple[int, Piece]:
    """The piece that a byte of the tensor belongs to, and its number.

    Raises:
        ValueError: the tensor has no such byte.
    """
    number, inside = 0, offset
    for band in bands:
        if inside < band_bytes(band):
            if len(band) == 1:
                return number, band[0]
            ends = list(accumulate(piece.row_bytes for piece in band))
            place = bisect_right(ends, inside % ends[-1])
            return number + place, band[place]
        inside -= band_bytes(band)
        number += len(band)
    raise ValueError(f"byte {offset} lies behind the tensor")


def _bytes_of(dtype: HeaderDType, shape: tuple[int, ...]) -> int:
    nbytes = bytes_of(dtype, shape)
    if nbytes is None:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return nbytes
