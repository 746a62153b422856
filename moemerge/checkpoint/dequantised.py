"""Matrices that are computed from quantised numbers and their scales while they are read, some rows at a time."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.codes import CODE_TYPES, Codes
from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.convert import BLOCK_ELEMENTS, fill
from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.floats import TYPES, Stored, narrow, round_to_half, widen
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES, HeaderDType, bytes_of
from moemerge.errors import CheckpointError


class DecodingError(Exception):
    """The parts of a matrix do not belong together; says why, as it follows "cannot be dequantised" in a message."""


class Decoder(Protocol):
    """How stored parts become numbers; its `repr` says everything that sets it apart from others."""

    def __call__(self, row: int, parts: list[Codes], values: NDArray[np.float32]) -> None:
        """Compute some rows of the matrix.

        Args:
            row: the first row.
            parts: of each stored part, the entries along its first axis that serve these rows.
            values: the rows that are computed (row, column), without gaps.

        Raises:
            DecodingError: the parts do not belong together.
        """


@dataclass(frozen=True)
class Part:
    """A stored tensor that a matrix is computed from."""

    tensor: TensorInfo
    span: int = 0
    """How many numbers of the matrix, row by row, an entry along the first axis serves; 0 if each needs all entries."""

    def serving(self, first: int, last: int) -> tuple[int, int]:
        """The first entry that serves the numbers from `first` up to `last`, and the one after the last."""
        if not self.span:
            return 0, self.tensor.shape[0] if self.tensor.shape else 1
        return first // self.span, -(-last // self.span)

    def slice(self, first: int, last: int) -> TensorInfo:
        """The entries that serve the numbers from `first` up to `last`."""
        if not self.span:
            return self.tensor
        begin, end = self.serving(first, last)
        return self.tensor.rows(begin, end - begin)


@dataclass(frozen=True, eq=False, repr=False)
class Dequantised(ComputedFile):
    """A matrix that is dequantised."""

    kind: str
    """How the matrix is stored, in words for messages: `FP8 with a scale per row`."""
    parts: tuple[Part, ...]
    """The quantised numbers, then their scales and whatever else they need."""
    decoder: Decoder
    shape: tuple[int, int]
    dtype: HeaderDType
    """Dtype of the result, as a safetensors header spells it."""
    computed_in: HeaderDType = "F32"
    """Dtype that the library computes the numbers in, to which they are rounded before they are to `dtype`."""

    @property
    def codes(self) -> TensorInfo:
        """The tensor of quantised numbers."""
        return self.parts[0].tensor

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The quantised numbers, then whatever else they need."""
        return tuple(part.tensor for part in self.parts)

    @property
    def settings(self) -> tuple[object, ...]:
        """How the matrix is computed."""
        return (self.decoder, [part.span for part in self.parts], self.shape, self.dtype, self.computed_in)

    @property
    def nbytes(self) -> int:
        """Size of the matrix in bytes."""
        return bytes_of(self.dtype, self.shape) or 0

    def tensor(self, name: str) -> TensorInfo:
        """The matrix as a tensor called `name`."""
        return TensorInfo(name, self, self.dtype, self.shape, 0, self.nbytes)

    def stored(self, start: int, nbytes: int) -> Iterator[TensorInfo]:
        """Yield what is read of each part for `nbytes` bytes of the matrix from offset `start` on."""
        first, last = self._rows(start, start + nbytes)
        for part in self.parts:
            yield part.slice(first * self.shape[1], last * self.shape[1])

    def blocks(self, start: int, end: int) -> Generator[memoryview, None, None]:
        """Yield some rows at a time.

        Raises:
            CheckpointError: a scale or another number is not finite, or not in `dtype`; or the parts do not belong
                together.
        """
        width = self.shape[1]
        row_bytes = bytes_of(self.dtype, (width,)) or 1
        first, last = self._rows(start, end)
        step = min(max(1, BLOCK_ELEMENTS // max(width, 1)), last - first)
        values, stored = np.empty((step, width), np.float32), np.empty(step * width, TYPES[self.dtype])
        spare = np.empty(step * width, np.uint32)
        with ExitStack() as opened:
            windows = [_Window(part, first * width, last * width, opened) for part in self.parts]
            for row in range(first, last, step):
                rows = min(step, last - row)
                entries = [window.move(row * width, (row + rows) * width) for window in windows]
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for
                    self._decode(row, entries, values[:rows])
                    self._narrow(values[:rows].reshape(-1), stored[: rows * width], spare[: rows * width])
                data = stored[: rows * width].view(np.uint8).data
                yield data[max(0, start - row * row_bytes) : end - row * row_bytes]

    def _rows(self, start: int, end: int) -> tuple[int, int]:
        """The first row that bytes lie in, and the one after the last."""
        row_bytes = bytes_of(self.dtype, (self.shape[1],)) or 1
        return start // row_bytes, min(-(-end // row_bytes), self.shape[0])

    def _decode(self, row: int, entries: list[Codes], values: NDArray[np.float32]) -> None:
        try:
            self.decoder(row, entries, values)
        except DecodingError as error:
            raise CheckpointError(
                f"{self}: tensor {self.codes.name!r} cannot be dequantised: {error}. Download that file again."
            ) from error

    def _narrow(self, values: NDArray[np.float32], stored: Stored, spare: NDArray[np.uint32]) -> None:
        """Round numbers to the dtype that they are computed in, then to that of the result."""
        if self.computed_in == "F16" != self.dtype:
            round_to_half(values, spare)
        elif self.computed_in not in {"F32", self.dtype}:
            rounded = np.empty(len(values), TYPES[self.computed_in])
            narrow(values, self.computed_in, rounded, spare)
            widen(rounded, self.computed_in, values)
        if narrow(values, self.dtype, stored, spare):
            return
        if broken := first_not_finite(part.tensor for part in self.parts):
            raise CheckpointError(
                f"{self}: tensor {self.codes.name!r} cannot be dequantised, since {broken}. Download that file again."
            )
        raise CheckpointError(
            f"{self}: tensor {self.codes.name!r} holds numbers times scales that {CONFIG_DTYPES[self.dtype]}, the "
            "model's own dtype, cannot express. Download that file again."
        )


class _Window:
    """The entries of a part that serve some consecutive numbers; each entry is read once."""

    def __init__(self, part: Part, first: int, last: int, opened: ExitStack) -> None:
        self._part = part
        self._reader = opened.enter_context(part.slice(first, last).open())
        self._begin, _ = part.serving(first, last)
        self._entries = np.empty((0, *part.tensor.shape[1:]), CODE_TYPES[part.tensor.dtype])

    def move(self, first: int, last: int) -> Codes:
        """The entries that serve the numbers from `first` up to `last`, which lie behind those before."""
        begin, end = self._part.serving(first, last)
        kept = self._entries[begin - self._begin :]
        count = end - begin - len(kept)
        if count:
            read = np.empty((count, *kept.shape[1:]), kept.dtype)
            fill(self._reader, read.reshape(-1).view(np.uint8).data, self._part.tensor)
            kept = np.concatenate([kept, read]) if len(kept) else read
        self._begin, self._entries = begin, kept
        return kept
