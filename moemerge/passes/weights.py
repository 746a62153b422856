"""Read stored tensors as torch tensors by their byte ranges, whatever file they lie in."""

from collections.abc import Iterable, Iterator
from typing import Final

import torch

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES

CHUNK_BYTES: Final = 2**20


def read_into(tensor: TensorInfo, target: torch.Tensor) -> None:
    """Fill `target` from the file, a chunk at a time; it has the same shape, and any device and float dtype.

    Raises:
        CheckpointError: the file ends too early.
    """
    dtype: torch.dtype = getattr(torch, CONFIG_DTYPES[tensor.dtype])
    flat = target.view(-1)
    done = 0
    for chunk in _chunks(tensor):
        values = torch.frombuffer(chunk, dtype=dtype)
        flat[done : done + len(values)].copy_(values)
        done += len(values)


def read_ahead(tensors: Iterable[TensorInfo]) -> None:
    """Bring the bytes of tensors into the page cache, so that reading them does not wait for the disk."""
    for tensor in tensors:
        for _ in _chunks(tensor):
            pass


def _chunks(tensor: TensorInfo) -> Iterator[memoryview]:
    """Yield a tensor's bytes in views of one buffer, which the next chunk overwrites."""
    buffer = bytearray(min(tensor.nbytes, CHUNK_BYTES))
    with tensor.open() as file:
        left = tensor.nbytes
        while left:
            view = memoryview(buffer)[:left]
            fill(file, view, tensor)
            left -= len(view)
            yield view
