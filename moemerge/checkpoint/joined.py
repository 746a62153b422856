"""Tensors that lie apart, read as one: below each other, or side by side."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.header import TensorInfo

_BLOCK_BYTES: Final = 2**23


@dataclass(frozen=True, eq=False, repr=False)
class Joined(ComputedFile):
    """A tensor that is made of others of one dtype."""

    parts: tuple[TensorInfo, ...]
    """Matrices one below the other, of equal width; or side by side, of equally many rows."""
    side_by_side: bool = False

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The parts in their order."""
        return self.parts

    @property
    def settings(self) -> tuple[object, ...]:
        """How the parts lie."""
        return (self.side_by_side,)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return sum(part.nbytes for part in self.parts)

    def blocks(self, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield bytes as far as the files of the parts have them: whoever reads says that one has ended."""
        return self._rows(start, end) if self.side_by_side else self._chunks(start, end)

    def _rows(self, start: int, end: int) -> Generator[bytes, None, None]:
        rows = self.parts[0].shape[0]
        widths = [part.nbytes // rows for part in self.parts]
        width = sum(widths)
        first, last = start // width, min(-(-end // width), rows)
        step = max(1, _BLOCK_BYTES // width)
        with ExitStack() as opened:
            readers = [opened.enter_context(part.rows(first, last - first).open()) for part in self.parts]
            for row in range(first, last, step):
                count = min(step, last - row)
                blocks = [read_exactly(reader, count * bytes_) for reader, bytes_ in zip(readers, widths, strict=True)]
                if any(len(block) < count * bytes_ for block, bytes_ in zip(blocks, widths, strict=True)):
                    return  # a file ends here, which whoever reads says
                pieces = [
                    np.frombuffer(block, np.uint8).reshape(count, bytes_)
                    for block, bytes_ in zip(blocks, widths, strict=True)
                ]
                data = np.concatenate(pieces, axis=1).tobytes()
                yield data[max(0, start - row * width) : end - row * width]

    def _chunks(self, start: int, end: int) -> Generator[bytes, None, None]:
        before = 0
        for part in self.parts:
            first, last = max(start - before, 0), min(end - before, part.nbytes)
            before += part.nbytes
            if first < last:
                with replace(part, start=part.start + first, nbytes=last - first).open() as reader:
                    while first < last and (block := read_exactly(reader, min(_BLOCK_BYTES, last - first))):
                        yield block
                        first += len(block)
                if first < last:
                    return  # the file ends here, which whoever reads says


def joined(name: str, parts: Sequence[TensorInfo]) -> TensorInfo:
    """The rows of several tensors as one tensor; where they follow each other in one file, a part of that file.

    Raises:
        ValueError: their dtypes differ, or their shapes beyond the first axis.
    """
    first = parts[0]
    if {(part.dtype, part.shape[1:]) for part in parts} != {(first.dtype, first.shape[1:])}:
        raise ValueError(f"{name}: {[(part.dtype, part.shape) for part in parts]} cannot lie below each other")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    nbytes = sum(part.nbytes for part in parts)
    follow = all(
        part.path == before.path and part.start == before.start + before.nbytes for before, part in pairwise(parts)
    )
    if follow:
        return replace(first, name=name, shape=shape, nbytes=nbytes)
    return TensorInfo(name, Joined(tuple(parts)), first.dtype, shape, 0, nbytes)


def rows_apart(tensor: TensorInfo) -> tuple[TensorInfo, ...]:
    """The tensors that `joined` put below each other, where they make up the whole of a tensor; else the tensor."""
    stack = tensor.path
    if isinstance(stack, Joined) and not stack.side_by_side and tensor.nbytes == stack.nbytes:
        return stack.parts
    return (tensor,)


def joined_columns(name: str, parts: Sequence[TensorInfo]) -> TensorInfo:
    """The columns of several matrices, side by side, as one tensor.

    Raises:
        ValueError: their dtypes differ, or the numbers of their rows.
    """
    first = parts[0]
    if {(part.dtype, part.shape[0]) for part in parts} != {(first.dtype, first.shape[0])}:
        raise ValueError(f"{name}: {[(part.dtype, part.shape) for part in parts]} cannot lie side by side")
    if len(parts) == 1:
        return replace(first, name=name)
    shape = (first.shape[0], sum(part.shape[1] for part in parts))
    made = Joined(tuple(parts), side_by_side=True)
    return TensorInfo(name, made, first.dtype, shape, 0, made.nbytes)
