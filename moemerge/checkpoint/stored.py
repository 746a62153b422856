"""Rows of matrices as they are stored, and as numpy's float32; numpy has no bfloat16, the upper half of a float32."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.convert import ended_inside
from moemerge.checkpoint.header import StoredTensor
from moemerge.dtypes import NAMED
from moemerge.errors import CheckpointError

_NUMPY: Final = {"float16": "<f2", "float32": "<f4"}


def stored_bytes(numbers: NDArray[np.float32], dtype: str) -> bytes:
    """Numbers as they are stored, rounded to the nearest, ties to even."""
    if dtype == "bfloat16":
        bits = numbers.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return numbers.astype(_NUMPY[dtype]).tobytes()


def float32_of(data: bytes, dtype: str) -> NDArray[np.float32]:
    """Stored numbers, exactly."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, _NUMPY[dtype]).astype(np.float32)


def read_rows(tensor: StoredTensor, rows: Sequence[int]) -> NDArray[np.float32]:
    """Some rows (len(rows), width) of a matrix; the others are not read.

    Raises:
        CheckpointError: there is no such row, or the file ends too early.
    """
    height, width = tensor.shape
    if max(rows) >= height:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} has {height} rows, but the tokenizer gives token {max(rows)}."
        )
    row_bytes = tensor.nbytes // height
    read = np.empty((len(rows), width), np.float32)
    with tensor.path.open("rb") as file:
        for place, row in zip(read, rows, strict=True):
            file.seek(tensor.start + row * row_bytes)
            data = file.read(row_bytes)
            if len(data) < row_bytes:
                raise ended_inside(tensor)
            place[:] = float32_of(data, NAMED[tensor.dtype])
    return read
