"""Stored numbers of every width as numpy arrays, and the floats that codes of eight and four bits stand for."""

from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.floats import widen
from moemerge.dtypes import HeaderDType

Codes = NDArray[Any]
"""Stored numbers: floats that numpy lacks are their bits."""

CODE_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
}
"""Map from the dtype in a safetensors header to the numpy type, for what quantised models are stored in."""


_POSITIVE: Final = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1: Final = np.array(_POSITIVE + [-number for number in _POSITIVE], np.float32)
"""All numbers of FP4 with 2 bits of exponent and 1 of mantissa, by their bits; see `e8m0`."""


def floats_of(codes: Codes, dtype: HeaderDType) -> NDArray[np.float32]:
    """The numbers that stored numbers are, exactly, in a new array of their shape; integers of 32 bits are rounded."""
    if dtype in {"F8_E4M3", "F8_E8M0"}:
        return np.take(e4m3() if dtype == "F8_E4M3" else e8m0(), codes)
    if dtype == "BF16":
        floats = np.empty(codes.shape, np.float32)
        widen(codes, dtype, floats)
        return floats
    return codes.astype(np.float32)


Alphabet = Literal["F8_E4M3", "I8", "4 bits", "8 bits", "FP4"]
"""What the bytes of quantised numbers stand for: numbers as they are, unsigned ones less half their range, or FP4.

Numbers of four bits lie two in a byte, the lower half first.
"""


def spell_out(codes: Codes, table: NDArray[np.float32], numbers: NDArray[np.float32]) -> None:
    """Look up the numbers that the bytes of an array stand for, in their order.

    Args:
        codes: the array, without gaps.
        table: the number of each byte (256,), or the two numbers of each (256, 2).
        numbers: as many numbers as there are, without gaps.
    """
    entry = np.float32 if table.ndim == 1 else np.float64  # both numbers at once
    found = numbers.reshape(-1).view(entry)
    # No byte is out of range, and to make sure takes longer.
    np.take(table.reshape(-1).view(entry), codes.reshape(-1).view(np.uint8), out=found, mode="clip")


def pairs(numbers: NDArray[np.float32], *, upper_first: bool = False) -> NDArray[np.float32]:
    """The two numbers of each byte (256, 2), of the numbers of each half of a byte (16,)."""
    halves = np.arange(256)[:, None] >> ([4, 0] if upper_first else [0, 4]) & 15
    return np.take(numbers, halves)


@cache
def table_of(alphabet: Alphabet) -> NDArray[np.float32]:
    """The number of each byte of an alphabet (256,), or the two numbers of each (256, 2)."""
    bytes_ = np.arange(256)
    if alphabet == "F8_E4M3":
        return e4m3()
    if alphabet == "I8":
        return bytes_.astype(np.uint8).view(np.int8).astype(np.float32)
    if alphabet == "8 bits":
        return (bytes_ - 128).astype(np.float32)
    return pairs(E2M1 if alphabet == "FP4" else (bytes_[:16] - 8).astype(np.float32))


@cache
def e4m3() -> NDArray[np.float32]:
    """All numbers of FP8 with 4 bits of exponent and 3 of mantissa, by their bits; the last of each sign is NaN.

    There are no infinities: https://arxiv.org/abs/2209.05433
    """
    bits = np.arange(128, dtype=np.float64)
    exponent, mantissa = np.floor(bits / 8), bits % 8
    numbers = np.where(exponent > 0, (8 + mantissa) * np.exp2(exponent - 10), mantissa * 2.0**-9)
    numbers[-1] = np.nan
    return np.concatenate([numbers, -numbers]).astype(np.float32)


@cache
def e8m0() -> NDArray[np.float32]:
    """All scales of the MX formats by their bits: powers of two from -127 on; the last is NaN.

    https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
    """
    scales = np.exp2(np.arange(256, dtype=np.float64) - 127)
    scales[-1] = np.nan
    return scales.astype(np.float32)
