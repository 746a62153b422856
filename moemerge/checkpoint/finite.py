"""Look for infinite and NaN numbers in stored tensors: how many, and where the first one is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.copy import Report
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import BITS, HeaderDType
from moemerge.errors import CheckpointError

CHUNK_BYTES: Final = 2**19
# Bits of infinity without the sign, or of NaN where there is no infinity; everything above is NaN.
_INFINITY: Final = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
}


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Numbers of a tensor that are infinite or NaN."""

    tensor: str
    file: str
    """Name of the file that holds the tensor; empty where the message names it otherwise."""
    count: int
    first: tuple[int, ...]
    """Index of the first such number along each axis."""

    @property
    def description(self) -> str:
        """How many numbers are not finite and where the first is, in words."""
        if self.count == 1:
            return f"1 number that is infinite or NaN, at {list(self.first)}"
        return f"{self.count} numbers that are infinite or NaN, the first at {list(self.first)}"

    def __str__(self) -> str:
        return f"{self.tensor}{f' of {self.file}' if self.file else ''} holds {self.description}"


class Census:
    """A count of the infinite and NaN numbers among a tensor's bytes, taken as they are read."""

    def __init__(self, tensor: TensorInfo) -> None:
        """Begin before the first byte of `tensor`.

        Raises:
            KeyError: the dtype has neither infinity nor NaN, or cannot be looked at: see `has_floats`.
        """
        self._tensor, self._infinity = tensor, _INFINITY[tensor.dtype]
        nbytes = BITS[tensor.dtype] // 8
        self._unsigned, self._signed = np.dtype(f"<u{nbytes}"), np.dtype(f"<i{nbytes}")
        self._sign = 1 << (8 * nbytes - 1)
        self._done = self._count = self._first = 0
        self._zeros = True

    def add(self, data: bytes | memoryview) -> None:
        """Count the next bytes, which hold whole numbers."""
        bits = np.frombuffer(data, self._unsigned)
        # Read as unsigned, negative numbers are the largest: two maxima find what is beyond all finite ones.
        negative, positive = bits.max(initial=0), bits.view(self._signed).max(initial=0)
        self._zeros &= not negative
        if positive >= self._infinity or negative >= self._sign + self._infinity:
            found = (bits & (self._sign - 1)) >= self._infinity
            if not self._count:
                self._first = self._done + int(found.argmax())
            self._count += int(np.count_nonzero(found))
        self._done += len(bits)

    @property
    def not_finite(self) -> NotFinite | None:
        """The infinite and NaN numbers so far; None where all are finite."""
        if not self._count:
            return None
        first = tuple(int(place) for place in np.unravel_index(self._first, self._tensor.shape))
        return NotFinite(self._tensor.name, str(self._tensor.path), self._count, first)

    @property
    def first_byte(self) -> int:
        """The offset in the tensor of the first number that is not finite, in bytes."""
        return self._first * self._unsigned.itemsize

    @property
    def only_zeros(self) -> bool:
        """Whether there were numbers and all were 0."""
        return self._zeros and self._done > 0


def has_floats(dtype: HeaderDType) -> bool:
    """Whether `Census` knows a stored dtype, as a safetensors header spells it: floats alone."""
    return dtype in _INFINITY


def look_at(tensor: TensorInfo, report: Report = lambda _: None) -> Census:
    """Take the census of all numbers of a tensor, a bounded chunk at a time.

    Args:
        tensor: a tensor of floats.
        report: called with the number of bytes read.

    Raises:
        CheckpointError: it cannot be read.
    """
    census = Census(tensor)
    buffer = memoryview(bytearray(min(tensor.nbytes, CHUNK_BYTES)))
    try:
        with tensor.open() as reader:
            for start in range(0, tensor.nbytes, CHUNK_BYTES):
                view = buffer[: tensor.nbytes - start]
                fill(reader, view, tensor)
                census.add(view)
                report(len(view))
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror or error}.") from error
    return census


def first_not_finite(tensors: Iterable[TensorInfo]) -> NotFinite | None:
    """Find the first tensor that holds infinite or NaN numbers; None where all are finite.

    Raises:
        CheckpointError: a file cannot be read.
    """
    looked = (look_at(tensor).not_finite for tensor in tensors if has_floats(tensor.dtype))
    return next(filter(None, looked), None)
