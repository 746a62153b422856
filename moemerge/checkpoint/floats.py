"""Stored floats in numpy, which has no bfloat16: a bfloat16 is the upper half of a float32."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moemerge.dtypes import HeaderDType

Stored = NDArray[Any]
"""An array of stored floats: float16 and float32 as they are, bfloat16 as its bits."""

TYPES: Final[dict[str, np.dtype[Any]]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Map from the dtype in a safetensors header to the numpy type."""

_BITS: Final[dict[int, np.dtype[Any]]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
# An infinity without its sign bit, shifted out to the left; NaNs are above it.
_INFINITY: Final = {"F32": 0xFF000000, "F16": 0xF800, "BF16": 0xFF00}
# The smallest float32 that rounds to bfloat16's infinity, shifted likewise: half a step above its largest number.
_ROUNDED_TO_INFINITY: Final = 0xFEFF0000

# The smallest float32 that rounds to float16's infinity, shifted likewise.
_BEYOND_HALF: Final = 0x477FF000 << 1
# In float32, the smallest normal float16, below which all are as far apart.
_LEAST_NORMAL_HALF: Final = 0x38800000
# What makes 1.5 * 2**13 times a power of two of that power: 13 bits less of the mantissa, and room below.
_HALF_STEPS: Final = (13 << 23) + 0x400000


def widen(stored: Stored, dtype: HeaderDType, floats: NDArray[np.float32]) -> None:
    """Convert stored numbers to float32 in `floats`, exactly."""
    if dtype == "BF16":
        bits = floats.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(floats, stored)


def narrow(floats: NDArray[np.float32], dtype: HeaderDType, stored: Stored, spare: NDArray[np.uint32]) -> bool:
    """Convert numbers into `stored`, rounded to the nearest, ties to even.

    Args:
        floats: the numbers to convert.
        dtype: the dtype of `stored`.
        stored: the result, as many elements as `floats`.
        spare: as many elements, which are overwritten.

    Returns:
        Whether all that was written is finite.
    """
    if dtype != "BF16":
        np.copyto(stored, floats, casting="same_kind")
        return is_finite(stored, dtype, spare)
    bits = floats.view(np.uint32)
    np.left_shift(bits, 1, out=spare)
    finite = bool(spare.max(initial=0) < _ROUNDED_TO_INFINITY)
    # Half a step more, less one bit where the result would be even, then the lower half falls.
    np.right_shift(bits, 16, out=spare)
    np.bitwise_and(spare, 1, out=spare)
    np.add(spare, bits, out=spare)
    np.add(spare, 0x7FFF, out=spare)
    np.right_shift(spare, 16, out=spare)
    np.copyto(stored, spare, casting="same_kind")
    if not finite:  # a NaN may have been carried over into a number
        stored[np.isnan(floats)] = 0x7FC0
    return finite


def round_to_half(floats: NDArray[np.float32], spare: NDArray[np.uint32]) -> None:
    """Round numbers in place to those that float16 has, to the nearest, ties to even: several times as fast as numpy.

    A number is rounded where it is added to another one whose neighbours are as far apart as its own in float16 are.

    Args:
        floats: the numbers.
        spare: as many elements, which are overwritten.
    """
    bits = floats.view(np.uint32)
    np.left_shift(bits, 1, out=spare)
    if spare.max(initial=0) >= _BEYOND_HALF:
        np.copyto(floats, floats.astype(np.float16))
        return
    signs = bits & 0x80000000
    np.bitwise_and(bits, 0x7F800000, out=spare)
    np.maximum(spare, _LEAST_NORMAL_HALF, out=spare)
    np.add(spare, _HALF_STEPS, out=spare)
    larger = spare.view(np.float32)
    np.add(floats, larger, out=floats)
    np.subtract(floats, larger, out=floats)
    np.bitwise_or(bits, signs, out=bits)  # of what became zero


def is_finite(stored: Stored, dtype: HeaderDType, spare: NDArray[np.uint32]) -> bool:
    """Whether no stored number is infinite or NaN; `spare` has as many elements, which are overwritten."""
    bits = stored.view(_BITS[stored.itemsize])
    shifted = spare.view(bits.dtype)[: len(bits)]
    np.left_shift(bits, 1, out=shifted)
    return bool(shifted.max(initial=0) < _INFINITY[dtype])
