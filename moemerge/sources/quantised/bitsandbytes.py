"""bitsandbytes: integers of 8 bits with a scale for each row, and NF4 and FP4 with one for each block of numbers.

The numbers are those of `bitsandbytes.functional.int8_vectorwise_dequant`, rounded to the model's dtype, and of
`dequantize_4bit`, in the dtype that was quantised. Blocks go on from row to row. Their scales may be quantised
themselves: https://arxiv.org/abs/2305.14314
"""

from dataclasses import dataclass
from functools import cache
from math import isfinite, prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.codes import Codes, pairs, spell_out, table_of
from moemerge.checkpoint.dequantised import Dequantised, Part
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.json_text import JsonTextError, parse_json
from moemerge.dtypes import CONFIG_DTYPES, HEADER_DTYPES, HeaderDType
from moemerge.sources.quantised.method import (
    Method,
    OddError,
    Parts,
    Settings,
    content,
    matrix,
    part_of,
    result_dtype,
    with_dtype,
    with_shape,
)

_STATE: Final = "weight.quant_state.bitsandbytes__"
_KINDS: Final = ("nf4", "fp4")
# Quantiles of the normal distribution, as the paper lists them, and bitsandbytes' own FP4, by their bits.
_NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4: Final = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_BYTE: Final = 256


@cache
def _table(kind: str) -> NDArray[np.float32]:
    if kind == "nf4":
        return pairs(np.array(_NF4, np.float32), upper_first=True)
    positive = np.array(_FP4, np.float32) / np.float32(max(_FP4))
    return pairs(np.concatenate([positive, 0 - positive]), upper_first=True)  # its other zero is positive, too


@dataclass(frozen=True)
class _Rows8Bit:
    """A decoder of integers of 8 bits with the largest number of each row."""

    def __call__(self, row: int, parts: list[Codes], values: NDArray[np.float32]) -> None:
        """Compute some rows (row, column)."""
        del row
        spell_out(parts[0], table_of("I8"), values)
        values *= parts[1][:, None]
        values *= np.float32(1 / 127)


@dataclass(frozen=True)
class _Blocks4Bit:
    """A decoder of numbers of 4 bits with the largest number of each block."""

    kind: str
    block: int
    """How many numbers share a scale."""
    nested: int = 0
    """How many scales share a scale, where they are codes of 8 bits; else 0."""
    offset: float = 0.0
    """What is added to scales that are codes."""

    def __call__(self, row: int, parts: list[Codes], values: NDArray[np.float32]) -> None:
        """Compute some rows (row, column)."""
        spell_out(parts[0], _table(self.kind), values)
        first = row * values.shape[1]
        scales = self._scales(first // self.block, parts) if self.nested else parts[1]
        before = first % self.block
        if before or values.size % self.block:
            flat = values.reshape(-1)
            flat *= np.repeat(scales, self.block)[before : before + len(flat)]
        else:
            blocks = values.reshape(-1, self.block)
            blocks *= scales[:, None]

    def _scales(self, first: int, parts: list[Codes]) -> NDArray[np.float32]:
        """The scales from number `first` on."""
        _, codes, outer, numbers = parts
        before = first % self.nested
        scales: NDArray[np.float32] = np.take(numbers, codes)
        scales *= np.repeat(outer, self.nested)[before : before + len(codes)]
        scales += np.float32(self.offset)
        return scales


def _weight(settings: Settings, parts: Parts, own: HeaderDType | None) -> Dequantised:
    del settings  # bitsandbytes reads what is stored
    kind = next((kind for kind in _KINDS if f"{_STATE}{kind}" in parts), None)
    return _eight_bits(parts, own) if kind is None else _four_bits(parts, kind)


def _eight_bits(parts: Parts, own: HeaderDType | None) -> Dequantised:
    codes = with_dtype(part_of(parts, "weight"), "weight", "I8")
    shape = matrix(codes)
    scale = with_shape(with_dtype(part_of(parts, "SCB"), "SCB", "F32"), "SCB", shape[:1])
    if "weight_format" in parts and any(content(parts["weight_format"])):
        raise OddError("is stored in the order of a GPU's kernels (weight_format), which bitsandbytes no longer reads")
    read = (Part(codes, shape[1]), Part(scale, shape[1]))
    kind = "8-bit integers of bitsandbytes with a scale per row"
    return Dequantised(kind, read, _Rows8Bit(), shape, result_dtype(own, "F32"))


def _four_bits(parts: Parts, kind: str) -> Dequantised:
    stored = part_of(parts, "weight")
    state = _state(parts[f"{_STATE}{kind}"])
    shape, block = state.shape, state.block
    codes = TensorInfo(stored.name, stored.path, "U8", (stored.nbytes,), stored.start, stored.nbytes)
    codes = with_shape(codes, "weight", (prod(shape) // 2,))  # in bytes, whatever dtype they are stored as
    count = -(-prod(shape) // block)
    scale = with_shape(part_of(parts, "weight.absmax"), "weight.absmax", (count,))
    words = f"{kind.upper()} of bitsandbytes with a scale per {block} numbers"
    if "weight.nested_absmax" not in parts:
        read = (Part(codes, 2), Part(with_dtype(scale, "weight.absmax", "F32"), block))
        return Dequantised(words, read, _Blocks4Bit(kind, block), shape, state.dtype)
    outer = with_dtype(parts["weight.nested_absmax"], "weight.nested_absmax", "F32")
    outer = with_shape(outer, "weight.nested_absmax", (-(-count // state.nested),))
    numbers = with_dtype(part_of(parts, "weight.nested_quant_map"), "weight.nested_quant_map", "F32")
    read_all = (
        Part(codes, 2),
        Part(with_dtype(scale, "weight.absmax", "U8"), block),
        Part(outer, block * state.nested),
        Part(with_shape(numbers, "weight.nested_quant_map", (_BYTE,))),
    )
    decoder = _Blocks4Bit(kind, block, state.nested, state.offset)
    return Dequantised(f"{words}, quantised themselves", read_all, decoder, shape, state.dtype)


@dataclass(frozen=True)
class _State:
    """What bitsandbytes stores of a weight beside its numbers."""

    shape: tuple[int, int]
    block: int
    dtype: HeaderDType
    nested: int
    offset: float


def _state(tensor: TensorInfo) -> _State:
    """Read the JSON of a quantised weight.

    Raises:
        OddError: it is not what bitsandbytes writes.
    """
    text = content(tensor)
    try:
        found = parse_json(text)
        rows, width = found["shape"]
        dtype = next(stored for name, stored in HEADER_DTYPES.items() if name == found["dtype"])
        state = _State(
            (rows, width),
            found["blocksize"],
            dtype,
            found.get("nested_blocksize", 1),
            float(found.get("nested_offset", 0.0)),
        )
    except (JsonTextError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise OddError(
            f"has a quant_state that is not read; JSON on a matrix in {', '.join(CONFIG_DTYPES.values())} is expected"
        ) from error
    sizes = (*state.shape, state.block, state.nested)
    if not all(type(size) is int and size > 0 for size in sizes) or not isfinite(state.offset) or width % 2:
        raise OddError(f"has a quant_state with sizes that are not read: {dict(found)!r:.200}")
    return state


_STORED: Final = ("weight", "SCB", "weight_format", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map")
BITSANDBYTES: Final = Method(
    frozenset({*_STORED, "weight.quant_map", *(f"{_STATE}{kind}" for kind in _KINDS)}), _weight
)
"""The method that `config.json` calls `bitsandbytes`."""
