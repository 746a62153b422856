"""Stored tensors as torch tensors, read by their byte ranges, whatever file they lie in."""

from collections.abc import Sequence
from typing import BinaryIO

import torch

from moemerge.checkpoint.header import StoredTensor
from moemerge.dtypes import NAMED
from moemerge.errors import CheckpointError


def read_weight(tensor: StoredTensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A whole tensor on `device` as `dtype`."""
    with tensor.path.open("rb") as file:
        return _read(file, tensor, tensor.start, tensor.shape).to(device=device, dtype=dtype)


def read_rows(tensor: StoredTensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows (len(rows), width) of a matrix, as float32; the others are not read.

    Raises:
        CheckpointError: there is no such row.
    """
    height, width = tensor.shape
    if max(rows) >= height:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} has {height} rows, but the tokenizer gives token {max(rows)}."
        )
    row_bytes = tensor.nbytes // height
    with tensor.path.open("rb") as file:
        read = [_read(file, tensor, tensor.start + row * row_bytes, (width,)) for row in rows]
    return torch.stack(read).float()


def _read(file: BinaryIO, tensor: StoredTensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, NAMED[tensor.dtype])
    buffer = bytearray(torch.Size(shape).numel() * dtype.itemsize)
    file.seek(start)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise CheckpointError(f"{tensor.path}: ended inside tensor {tensor.name!r}: was it changed during the merge?")
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
