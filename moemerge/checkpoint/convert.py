"""Tensor bytes that change on the way: another dtype, a scale, added noise. The only copy that needs torch."""

import math
import zlib
from collections.abc import Callable
from io import FileIO
from typing import TYPE_CHECKING, Final

from moemerge.checkpoint.copy import Report, write_all
from moemerge.checkpoint.header import StoredTensor
from moemerge.dtypes import NAMED
from moemerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Read and written at once. Larger chunks leave the processor's cache on the way; all buffers take 1 MiB.
CHUNK_ELEMENTS: Final = 2**17
# Computed at once. More, and torch starts threads of its own beside each of ours, which fight for the same cores.
# Sizes that are no multiple of 16 get other noise at their end if this is changed.
BLOCK_ELEMENTS: Final = 2**15


def convert(
    source: FileIO, tensor: StoredTensor, target: int, dtype: str, report: Report, *,
    scale: float = 1.0, noise_scale: float = 0.0, seed: str = "",
) -> None:  # fmt: skip
    """Write `(tensor + noise_scale * N(0, 1)) * scale`, computed in float32, as `dtype` at the target's position.

    The noise depends on the text `seed` alone, so that two runs agree; each output tensor needs its own.
    Numbers are those of `Tensor.to`; which of its bit patterns a NaN gets is left open, as it is there.

    Raises:
        CheckpointError: the source ends too early, or a finite weight is infinite in `dtype`.
    """
    import torch

    source_dtype, target_dtype = getattr(torch, NAMED[tensor.dtype]), getattr(torch, NAMED[dtype])
    convert_block = _arithmetic(tensor, dtype, scale, noise_scale, seed)

    def convert_chunks(chunks: int, elements: int) -> None:
        stored, converted = torch.empty(elements, dtype=source_dtype), torch.empty(elements, dtype=target_dtype)
        stored_bytes, converted_bytes = stored.view(torch.uint8).numpy().data, converted.view(torch.uint8).numpy().data
        spare = torch.empty(2, min(elements, BLOCK_ELEMENTS))
        # Views are made once: making them takes a third of the time of casting what they show.
        spans = [slice(start, start + BLOCK_ELEMENTS) for start in range(0, elements, BLOCK_ELEMENTS)]
        blocks = [(stored[span], converted[span], *spare[:, : len(stored[span])]) for span in spans]
        for _ in range(chunks):
            fill(source, stored_bytes, tensor)
            for block in blocks:
                convert_block(*block)
            write_all(target, converted_bytes)
            report(len(converted_bytes))

    source.seek(tensor.start)
    whole_chunks, rest = divmod(tensor.nbytes // source_dtype.itemsize, CHUNK_ELEMENTS)
    if whole_chunks:
        convert_chunks(whole_chunks, CHUNK_ELEMENTS)
    if rest:
        convert_chunks(1, rest)


def ended_inside(tensor: StoredTensor) -> CheckpointError:
    """What to tell the user when a source is shorter than its header said."""
    return CheckpointError(f"{tensor.path}: ended inside tensor {tensor.name!r}: was it changed during the merge?")


def fill(source: FileIO, view: memoryview, tensor: StoredTensor) -> None:
    """Read until `view` is full; one read may give less.

    Raises:
        CheckpointError: the source ends too early.
    """
    while view:
        count = source.readinto(view)
        if not count:
            raise ended_inside(tensor)
        view = view[count:]


def _arithmetic(
    tensor: StoredTensor, dtype: str, scale: float, noise_scale: float, seed: str
) -> Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"], None]:
    """The function that converts one block into `result`; `floats` and `noise` are memory that it may use."""
    import torch

    source_dtype, target_dtype = getattr(torch, NAMED[tensor.dtype]), getattr(torch, NAMED[dtype])
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    is_changed = scale != 1.0 or noise_scale != 0.0
    may_overflow = is_changed or torch.finfo(source_dtype).max > torch.finfo(target_dtype).max
    # From float16 to bfloat16 or back torch goes number by number. float32 holds both; by way of it is 4 times faster.
    through_float32 = is_changed or torch.float32 not in {source_dtype, target_dtype}

    def convert_block(values: torch.Tensor, result: torch.Tensor, floats: torch.Tensor, noise: torch.Tensor) -> None:
        if through_float32:
            values = floats.copy_(values)
        if noise_scale != 0.0:
            values += noise.normal_(generator=generator).mul_(noise_scale)
        if scale != 1.0:
            values *= scale
        result.copy_(values)
        if may_overflow:
            low, high = torch.aminmax(result)  # both NaN where there is one
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                _refuse_overflow(values, result, tensor, NAMED[dtype])

    return convert_block


def _refuse_overflow(values: "torch.Tensor", converted: "torch.Tensor", tensor: StoredTensor, dtype: str) -> None:
    """Raise if a finite number became infinite; the source's own infinities and NaNs may stay."""
    lost = converted.isinf() & values.isfinite()
    if bool(lost.any()):
        largest = values[lost].abs().max().item()
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} holds {largest:g}, which {dtype} cannot express. "
            "Set `dtype: bfloat16` or `dtype: float32` in the config."
        )
