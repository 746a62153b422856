"""Quantised numbers with a scale for each matrix, row, group of columns or block of rows and columns."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.codes import Alphabet, Codes, floats_of, spell_out, table_of
from moemerge.dtypes import HeaderDType

Floats = NDArray[np.float32]
Block = tuple[int, int]
"""How many rows and columns share a scale; blocks at the lower and right borders may be smaller."""


def grid_of(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """How many blocks a matrix has below each other, and side by side."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def in_words(shape: tuple[int, int], block: Block) -> str:
    """What shares a scale, in words: `matrix`, `row`, `128 columns of a row`, `block of 128 x 128`."""
    if block == shape:
        return "matrix"
    if block[0] > 1:
        return f"block of {block[0]} x {block[1]}"
    return "row" if block[1] == shape[1] else f"{block[1]} columns of a row"


def spread(grid: Floats, block: Block, row: int, values: Floats) -> Floats:
    """The numbers of a grid of blocks in a form that broadcasts against some rows of the matrix, seen by `blocks_of`.

    Args:
        grid: the rows of the grid that serve these rows (block row, block column).
        block: the size of a block.
        row: the number of the first row.
        values: the rows (row, column).
    """
    if len(grid) > 1:
        grid = grid[np.arange(row, row + len(values)) // block[0] - row // block[0]]
    if values.shape[1] % block[1]:
        return np.repeat(grid, block[1], axis=1)[:, : values.shape[1]]
    return grid[:, :, None]


def blocks_of(values: Floats, block: Block) -> Floats:
    """Rows of a matrix seen by blocks (row, block, column), or as they are where blocks do not fill them."""
    return values if values.shape[1] % block[1] else values.reshape(len(values), -1, block[1])


@dataclass(frozen=True)
class Scaled:
    """A decoder of numbers times their scales."""

    block: Block
    codes: Alphabet
    """What the quantised numbers are stored as."""
    scales: HeaderDType
    zeros: HeaderDType | None = None
    """Dtype of the numbers that stand for zero, one beside each scale; None if zero does.

    As I32 they are packed like the quantised numbers, rows of the matrix in a word.
    """
    divided: bool = False
    """Whether the last part is a number that all scales are divided by."""

    def __call__(self, row: int, parts: list[Codes], values: Floats) -> None:
        """Compute some rows (row, column)."""
        spell_out(parts[0], table_of(self.codes), values)
        seen = blocks_of(values, self.block)
        if self.zeros == "I32":
            seen -= spread(self._unpacked(row, len(values), parts[2]), self.block, row, values)
        elif self.zeros:
            seen -= spread(floats_of(parts[2], self.zeros), self.block, row, values)
        scales = floats_of(parts[1], self.scales)
        if self.divided:
            scales /= parts[-1]
        seen *= spread(scales, self.block, row, values)

    def _unpacked(self, row: int, rows: int, words: Codes) -> Floats:
        """The numbers that stand for zero in some rows (row, block column), of words that each serve several rows."""
        in_word = 4 if self.codes == "8 bits" else 8
        numbers = np.empty((*words.shape, in_word), np.float32)
        spell_out(words, table_of(self.codes), numbers)
        return numbers.swapaxes(1, 2).reshape(-1, words.shape[1])[row % in_word :][:rows]
