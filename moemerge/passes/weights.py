"""Read stored tensors as torch tensors by their byte ranges, whatever file they lie in."""

from collections.abc import Iterable, Iterator
from typing import Final

import torch

from moemerge.checkpoint.convert import fill
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.passes.compute_dtype import Compute

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


def read_parameter(
    module: torch.nn.Module, name: str, tensor: TensorInfo, room: dict[str, torch.Tensor], compute: Compute
) -> None:
    """Read a tensor straight into a module's parameter or buffer, in the dtype and on the device of the pass.

    Args:
        module: the module.
        name: the path of the parameter within the module.
        tensor: the stored tensor.
        room: memory by name, which the tensor of another module with this name and shape has used.
        compute: the device and dtype of the pass.

    Raises:
        CheckpointError: the file ends too early.
    """
    if name not in room or room[name].shape != tensor.shape:
        room[name] = torch.empty(tensor.shape, device=compute.device, dtype=compute.dtype)
    read_into(tensor, room[name])
    _put(module, name, room[name])


def _put(module: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    is_buffer = own in dict(owner.named_buffers(recurse=False))
    setattr(owner, own, values if is_buffer else torch.nn.Parameter(values, requires_grad=False))


def copy_parameter(
    module: torch.nn.Module, name: str, given: torch.Tensor, room: dict[str, torch.Tensor], compute: Compute
) -> None:
    """Copy values that `read_parameter` has read for one device into the same module on another."""
    if name not in room or room[name].shape != given.shape:
        room[name] = torch.empty(given.shape, device=compute.device, dtype=compute.dtype)
    _put(module, name, room[name].copy_(given))


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
