"""Tensor bytes that change on the way: another dtype, a scale, added noise. The only copy that needs torch."""

import zlib
from io import FileIO
from typing import TYPE_CHECKING, Final

from moemerge.checkpoint.copy import Report, write_all
from moemerge.checkpoint.header import StoredTensor
from moemerge.dtypes import BITS, NAMED
from moemerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS: Final = 2**22  # 16 MiB of float32


def convert(
    source: FileIO, tensor: StoredTensor, target: int, dtype: str, report: Report, *,
    scale: float = 1.0, noise_scale: float = 0.0, seed: str = "",
) -> None:  # fmt: skip
    """Write `(tensor + noise_scale * N(0, 1)) * scale`, computed in float32, as `dtype` at the target's position.

    The noise depends on the text `seed` alone, so that two runs agree; each output tensor needs its own.

    Raises:
        CheckpointError: the source ends too early, or a finite weight is infinite in `dtype`.
    """
    import torch

    source_dtype, target_dtype = getattr(torch, NAMED[tensor.dtype]), getattr(torch, NAMED[dtype])
    width = BITS[tensor.dtype] // 8
    buffer = bytearray(min(tensor.nbytes, CHUNK_ELEMENTS * width))
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    source.seek(tensor.start)
    done = 0
    while done < tensor.nbytes:
        view = memoryview(buffer)[: min(len(buffer), tensor.nbytes - done)]
        _read_into(source, view, tensor)
        values = torch.frombuffer(view, dtype=source_dtype)
        if noise_scale != 0.0:
            values = values.float() + noise_scale * torch.randn(values.shape, generator=generator)
        if scale != 1.0:
            values = values.float() * scale
        converted = values.to(target_dtype)
        _check_overflow(values, converted, tensor, NAMED[dtype])
        write_all(target, converted.view(torch.uint8).numpy().data)
        done += len(view)
        report(converted.nbytes)


def ended_inside(tensor: StoredTensor) -> CheckpointError:
    """What to tell the user when a source is shorter than its header said."""
    return CheckpointError(f"{tensor.path}: ended inside tensor {tensor.name!r}: was it changed during the merge?")


def _read_into(source: FileIO, view: memoryview, tensor: StoredTensor) -> None:
    while view:
        count = source.readinto(view)
        if not count:
            raise ended_inside(tensor)
        view = view[count:]


def _check_overflow(values: "torch.Tensor", converted: "torch.Tensor", tensor: StoredTensor, dtype: str) -> None:
    if converted.dtype.itemsize >= values.dtype.itemsize and dtype != "float16":
        return  # a float32 or bfloat16 exponent holds every value
    lost = converted.isinf() & values.isfinite()
    if bool(lost.any()):
        largest = values[lost].abs().max().item()
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} holds {largest:g}, which {dtype} cannot express. "
            "Set `dtype: bfloat16` or `dtype: float32` in the config."
        )
