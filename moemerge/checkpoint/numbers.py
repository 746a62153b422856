"""Conversion between rows of stored matrices and numpy's float32."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.convert import ended_inside
from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.floats import TYPES, narrow, widen
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES, HEADER_DTYPES, DType
from moemerge.errors import CheckpointError


def stored_bytes(numbers: NDArray[np.float32], dtype: DType) -> bytes:
    """Encode numbers as stored bytes, rounded to the nearest, ties to even."""
    numbers = numbers.ravel()
    stored = np.empty(len(numbers), TYPES[HEADER_DTYPES[dtype]])
    narrow(numbers, HEADER_DTYPES[dtype], stored, np.empty(len(numbers), np.uint32))
    return stored.tobytes()


def is_rounded(one: NDArray[np.float32], other: NDArray[np.float32], dtypes: Sequence[DType]) -> bool:
    """Whether two arrays are equal up to the rounding of one side to its dtype; False where both have one dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        return len(set(dtypes)) > 1 and any(stored_bytes(one, d) == stored_bytes(other, d) for d in dtypes)


def float32_of(data: bytes, dtype: DType) -> NDArray[np.float32]:
    """Decode stored numbers, exactly."""
    stored = np.frombuffer(data, TYPES[HEADER_DTYPES[dtype]])
    floats = np.empty(len(stored), np.float32)
    widen(stored, HEADER_DTYPES[dtype], floats)
    return floats


def read_rows(tensor: TensorInfo, rows: Sequence[int]) -> NDArray[np.float32]:
    """Read some rows (len(rows), width) of a matrix and no others.

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
    for place, row in zip(read, rows, strict=True):
        with tensor.rows(row, 1).open() as reader:
            data = read_exactly(reader, row_bytes)
        if len(data) < row_bytes:
            raise ended_inside(tensor)
        place[:] = float32_of(data, CONFIG_DTYPES[tensor.dtype])
    return read
