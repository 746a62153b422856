"""GPTQ and AWQ: whole numbers of 4 or 8 bits, packed in words of 32, with scales and zero points for groups of columns.

Both store the transpose of a weight: a row of the matrix is a column of what is stored, which is read whole for that.
The numbers are those of GPTQModel's `dequantize_weight` and AutoAWQ's `dequantize_gemm`, computed in the dtype of the
scales, then rounded to the model's own: https://arxiv.org/abs/2210.17323, https://arxiv.org/abs/2306.00978
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.codes import Codes, floats_of, pairs, spell_out
from moemerge.checkpoint.dequantised import DecodingError, Dequantised, Part
from moemerge.dtypes import HeaderDType
from moemerge.sources.quantised.method import (
    Method,
    OddError,
    Parts,
    Settings,
    matrix,
    part_of,
    result_dtype,
    with_dtype,
    with_shape,
)

_WORD_BITS: Final = 32
_BITS: Final = (4, 8)
# The number in each place of AWQ's words of eight numbers of 4 bits.
_AWQ_PLACES: Final = [0, 4, 1, 5, 2, 6, 3, 7]
_FORMATS: Final[Mapping[str, tuple[str, ...]]] = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}


@cache
def _table(bits: int) -> NDArray[np.float32]:
    """What each byte stands for."""
    return pairs(np.arange(16, dtype=np.float32)) if bits == _BITS[0] else np.arange(256, dtype=np.float32)


def _unpacked(words: Codes, bits: int) -> NDArray[np.float32]:
    """The numbers in each word, the lowest first (row, word, number)."""
    numbers = np.empty((*words.shape, _WORD_BITS // bits), np.float32)
    spell_out(np.ascontiguousarray(words), _table(bits), numbers)
    return numbers


@dataclass(frozen=True)
class _Columns:
    """A decoder of a packed transpose."""

    bits: int
    group: int
    """How many columns of the matrix share a scale where the file does not say it of each column."""
    scales: HeaderDType
    packs_rows: bool
    """Whether a word holds numbers of one column, of several rows of what is stored (GPTQ), or of one row (AWQ)."""
    zero_step: int = 0
    """What is added to all the words of zero points."""

    def __call__(self, row: int, parts: list[Codes], values: NDArray[np.float32]) -> None:
        """Compute some rows (row, column)."""
        codes, zeros, scales = parts[:3]
        rows = len(values)
        if self.packs_rows:
            spell_out(np.ascontiguousarray(codes[:, row : row + rows].T), _table(self.bits), values)
        else:
            values[...] = self._columns(codes, row, rows).T
        zero = self._columns(zeros, row, rows, step=self.zero_step)
        scale = floats_of(scales[:, row : row + rows], self.scales)
        if len(parts) > len((codes, zeros, scales)):
            groups = self._checked(parts[3], len(scales))
            values -= zero.T[:, groups]
            values *= scale.T[:, groups]
        else:
            seen = values.reshape(rows, -1, self.group)
            seen -= zero.T[:, :, None]
            seen *= scale.T[:, :, None]

    def _columns(self, words: Codes, first: int, count: int, step: int = 0) -> NDArray[np.float32]:
        """Some columns of a matrix of which each word holds several, and to each of which `step` is added."""
        in_word = _WORD_BITS // self.bits
        before = first // in_word
        chosen = words[:, before : -(-(first + count) // in_word)].view(np.uint32)
        numbers = _unpacked(chosen + np.uint32(step), self.bits)
        if not self.packs_rows:
            numbers = numbers[:, :, _AWQ_PLACES]
        return numbers.reshape(len(words), -1)[:, first - before * in_word :][:, :count]

    def _checked(self, groups: Codes, count: int) -> Codes:
        if groups.min() < 0 or groups.max() >= count:
            raise DecodingError(f"g_idx names groups from {groups.min()} to {groups.max()}, and there are {count}")
        return groups


def _weight(settings: Settings, parts: Parts, own: HeaderDType | None) -> Dequantised:
    is_gptq = settings.get("quant_method") == "gptq"
    bits, form = _settings(settings, "gptq" if is_gptq else "awq")
    in_word = _WORD_BITS // bits
    codes = with_dtype(part_of(parts, "qweight"), "qweight", "I32")
    scales = with_dtype(part_of(parts, "scales"), "scales", "F16", "BF16", "F32")
    height, width = matrix(codes)
    columns, rows = (height * in_word, width) if is_gptq else (height, width * in_word)
    count = matrix(scales)[0]
    if columns % count:
        raise OddError(f"has scales for {count} groups of {columns} columns")
    scales = with_shape(scales, "scales", (count, rows))
    zeros = with_dtype(part_of(parts, "qzeros"), "qzeros", "I32")
    zeros = with_shape(zeros, "qzeros", (count, -(-rows // in_word)))
    read = [Part(codes), Part(zeros), Part(scales)]
    if "g_idx" in parts:
        read.append(Part(with_shape(with_dtype(parts["g_idx"], "g_idx", "I32"), "g_idx", (columns,))))
    # The first format stores zero points less one in each place of a word.
    step = sum(1 << place for place in range(0, _WORD_BITS, bits)) if form == "gptq" else 0
    return Dequantised(
        f"{bits}-bit integers with a scale per {columns // count} columns of a row ({'GPTQ' if is_gptq else 'AWQ'})",
        tuple(read),
        _Columns(bits, columns // count, scales.dtype, packs_rows=is_gptq, zero_step=step),
        (rows, columns),
        result_dtype(own, scales.dtype),
        scales.dtype,
    )


def _settings(settings: Settings, method: str) -> tuple[int, str]:
    """The bits of a number, and the format.

    Raises:
        OddError: they are not among those that are read.
    """
    keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
    form = next((str(settings[key]).lower() for key in keys if settings.get(key)), _FORMATS[method][0])
    bits = settings.get("bits", settings.get("w_bit", _BITS[0]))
    known = _BITS if method == "gptq" else _BITS[:1]
    if form not in _FORMATS[method] or bits not in known:
        raise OddError(
            f"is quantised as {form:.40} with {bits!r:.10} bits, and of {method} {' and '.join(_FORMATS[method])} with "
            f"{' or '.join(map(str, known))} bits alone are read"
        )
    return int(bits), form


_STORED: Final = frozenset({"qweight", "qzeros", "scales", "g_idx"})
GPTQ: Final = Method(_STORED, _weight, zero_biases=True)
"""The method that `config.json` calls `gptq`."""
AWQ: Final = Method(_STORED, _weight)
"""The method that `config.json` calls `awq`."""
