"""Tensors whose numbers are computed from those of others while they are read, some rows at a time."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.convert import CHUNK_ELEMENTS, fill, wider
from moemerge.checkpoint.dequantised import Dequantised
from moemerge.checkpoint.files import Reader
from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.floats import TYPES, narrow, widen
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.packed import Packed
from moemerge.checkpoint.unreadable import Unreadable
from moemerge.dtypes import CONFIG_DTYPES, HeaderDType, bytes_of
from moemerge.errors import CheckpointError

Rows = NDArray[np.float32]
"""Some rows of a matrix (row, width); the elements of a vector are rows of one."""
Recipe = Callable[[int, list[Rows]], Rows]
"""A function of the number of the first row and the same rows of each input; it returns those rows of the result."""


@dataclass(frozen=True, eq=False, repr=False)
class Derived(ComputedFile):
    """A tensor that is computed from `inputs` of its shape.

    The result is rounded once, to `dtype`. It is computed in blocks that begin at fixed rows.
    """

    made_as: str
    """How the tensor is made, in words for messages."""
    inputs: tuple[TensorInfo, ...]
    recipe: Recipe
    recipe_key: str
    """Everything that sets this recipe apart from others and is not in the inputs; part of `identity`."""
    dtype: HeaderDType
    """Dtype of the result, as a safetensors header spells it."""
    rereads: bool = False
    """Whether the recipe reads the inputs once more by itself."""
    others: tuple[TensorInfo, ...] = ()
    """Other tensors that the recipe reads; they may have other shapes."""

    def __repr__(self) -> str:
        return f"{self.made_as}: {self.inputs[0].path}"

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The inputs, then what else the recipe reads."""
        return (*self.inputs, *self.others)

    @property
    def settings(self) -> tuple[object, ...]:
        """The recipe, and the dtype that its results are rounded to."""
        return (self.recipe_key, self.dtype)

    @property
    def name(self) -> str:
        """How the tensor is made, as a message names it in the place of a file."""
        return self.made_as

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.inputs[0].shape

    @property
    def nbytes(self) -> int:
        """Size of the result in bytes."""
        return bytes_of(self.dtype, self.shape) or 0

    def tensor(self, name: str) -> TensorInfo:
        """The result as a tensor called `name`."""
        return TensorInfo(name, self, self.dtype, self.shape, 0, self.nbytes)

    def first_row(self, rows: TensorInfo) -> int:
        """The row number in the whole result at which the slice `rows` begins."""
        return rows.start * self.shape[0] // max(self.nbytes, 1)

    def input_rows(self, rows: TensorInfo) -> TensorInfo:
        """The rows of the first input from which the slice `rows` of the result is computed."""
        return self.inputs[0].rows(self.first_row(rows), rows.shape[0])

    def blocks(self, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield the results of a block of rows at a time.

        Raises:
            CheckpointError: a finite number is infinite in `dtype`, or an input is not finite.
        """
        rows, width = _as_matrix(self.inputs[0])
        row_bytes = bytes_of(self.dtype, (width,)) or 1
        step = max(1, CHUNK_ELEMENTS // width)
        first = start // row_bytes // step * step
        last = min(-(-end // row_bytes), rows)
        for row, blocks in zip(range(first, last, step), blocks_of(self.inputs, first), strict=False):
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what is not finite is looked for
                data = self._encode(self.recipe(row, blocks))
            yield data[max(0, start - row * row_bytes) : end - row * row_bytes]

    def _encode(self, values: Rows) -> bytes:
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        stored = np.empty(len(flat), TYPES[self.dtype])
        if not narrow(flat, self.dtype, stored, np.empty(len(flat), np.uint32)):
            if broken := first_not_finite((*self.inputs, *self.others)):
                raise CheckpointError(f"{self}: cannot be computed, since {broken}. Download that file again.")
            raise CheckpointError(
                f"{self}: holds numbers that {CONFIG_DTYPES[self.dtype]} cannot express. {wider(self.dtype)}."
            )
        return stored.tobytes()


def blocks_of(tensors: Sequence[TensorInfo], first: int = 0) -> Iterator[list[Rows]]:
    """Yield the numbers of tensors of one shape, block by block; row `first` must be the first of a block.

    Raises:
        CheckpointError: a file ends too early.
    """
    rows, width = _as_matrix(tensors[0])
    step = max(1, CHUNK_ELEMENTS // width)
    with ExitStack() as opened:
        readers = [opened.enter_context(_rows_from(tensor, first).open()) for tensor in tensors]
        for row in range(first, rows, step):
            count = min(step, rows - row)
            yield [_read(reader, tensor, count, width) for reader, tensor in zip(readers, tensors, strict=True)]


def stacks_of(tensors: Sequence[TensorInfo], step: int) -> Iterator[tuple[int, Rows]]:
    """Yield the number of a row, and `step` rows from it on of matrices of one shape (tensor, row, width).

    The array is overwritten by the next.

    Raises:
        CheckpointError: a file ends too early.
    """
    rows, width = _as_matrix(tensors[0])
    values = np.empty((len(tensors), min(step, rows), width), np.float32)
    stored = {tensor.dtype: np.empty(values[0].size, TYPES[tensor.dtype]) for tensor in tensors}
    with ExitStack() as opened:
        readers = [opened.enter_context(tensor.open()) for tensor in tensors]
        for row in range(0, rows, step):
            count = min(step, rows - row)
            for reader, tensor, block in zip(readers, tensors, values, strict=True):
                part = stored[tensor.dtype][: count * width]
                fill(reader, part.view(np.uint8).data, tensor)
                widen(part, tensor.dtype, block[:count].reshape(-1))
            yield row, values[:, :count]


def derivation(tensor: TensorInfo) -> Derived | None:
    """How a tensor is computed from others; None for one that is stored."""
    return tensor.path if isinstance(tensor.path, Derived) else None


def leaves(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """Yield the stored tensors that a tensor is read from in the end: itself, or all that it is made of."""
    for plain in plain_leaves(tensor):
        if isinstance(plain.path, Dequantised):
            yield from plain.path.stored(plain.start, plain.nbytes)
        else:
            yield plain


def plain_leaves(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """Yield the tensors of plain numbers that a tensor is read from: as `leaves`, but a dequantised one is itself."""
    if isinstance(tensor.path, ComputedFile) and not isinstance(tensor.path, Dequantised):
        for source in tensor.path.sources:
            yield from plain_leaves(source)
    elif isinstance(tensor.path, Packed | Unreadable):
        yield tensor.path.stored
    else:
        yield tensor


def kinds_of(tensors: Iterable[TensorInfo]) -> list[str]:
    """How the dequantised ones among some tensors are stored, in words, each once."""
    paths = (plain.path for tensor in tensors for plain in plain_leaves(tensor))
    return sorted({path.kind for path in paths if isinstance(path, Dequantised)})


def read_values(tensor: TensorInfo) -> NDArray[np.float32]:
    """Read all numbers of a small tensor, in its shape.

    Raises:
        CheckpointError: its file ends too early.
    """
    with tensor.open() as reader:
        return _read(reader, tensor, *_as_matrix(tensor)).reshape(tensor.shape)


def _as_matrix(tensor: TensorInfo) -> tuple[int, int]:
    """Rows and width of a tensor: all axes but the last, and the last; for a vector, its elements and 1."""
    width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    return int(np.prod(tensor.shape)) // max(width, 1), width


def _rows_from(tensor: TensorInfo, first: int) -> TensorInfo:
    shape = _as_matrix(tensor)
    return replace(tensor, shape=shape).rows(first, shape[0] - first)


def _read(reader: Reader, tensor: TensorInfo, count: int, width: int) -> Rows:
    stored = np.empty(count * width, TYPES[tensor.dtype])
    fill(reader, stored.view(np.uint8).data, tensor)
    values = np.empty(count * width, np.float32)
    widen(stored, tensor.dtype, values)
    return values.reshape(count, width)


@dataclass(frozen=True, eq=False)
class ScaledColumns:
    """A recipe that multiplies each column of a matrix by a factor of its own."""

    factors: Rows
    """Factors, one for each column (width,)."""

    def __call__(self, _row: int, blocks: list[Rows]) -> Rows:
        """Multiply some rows by the factors."""
        return blocks[0] * self.factors


def unscaled(tensor: TensorInfo) -> TensorInfo:
    """Return the same rows of a matrix before `ScaledColumns` multiplied its columns; any other tensor unchanged."""
    while (made := derivation(tensor)) and isinstance(made.recipe, ScaledColumns):
        tensor = made.input_rows(tensor)
    return tensor


def plus(tensor: TensorInfo, number: float) -> TensorInfo:
    """Return a tensor with a number added to each of its elements, computed in float32."""

    def recipe(_row: int, blocks: list[Rows]) -> Rows:
        total: Rows = blocks[0] + np.float32(number)
        return total

    return Derived(f"{number:g} added to", (tensor,), recipe, f"plus {number!r}", "F32").tensor(tensor.name)


def linear(weights: Sequence[float]) -> Recipe:
    """A recipe for the weighted sum of the inputs; the weights add up to 1."""

    def recipe(_row: int, blocks: list[Rows]) -> Rows:
        first = blocks[0]
        total = first.copy()  # equal numbers stay what they are
        for weight, block in zip(weights[1:], blocks[1:], strict=True):
            total += np.float32(weight) * (block - first)
        return total

    return recipe
