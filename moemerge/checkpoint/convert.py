"""Convert tensor bytes while they are copied: to another dtype, with a scale, with added noise."""

import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.files import Readable
from moemerge.checkpoint.floats import TYPES, Stored, is_finite, narrow, widen
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES, HeaderDType
from moemerge.errors import CheckpointError, TooLargeError

# Elements read and written at once. Larger chunks leave the processor's cache on the way; all buffers take some 1 MiB.
CHUNK_ELEMENTS: Final = 2**17
# Elements computed at once, in several passes over memory that stays in the cache.
BLOCK_ELEMENTS: Final = 2**16


def convert(
    source: Readable,
    tensor: TensorInfo,
    dtype: HeaderDType,
    chunk_elements: int,
    *,
    scale: float = 1.0,
    noise_scale: float = 0.0,
    seed: str = "",
) -> Iterator[memoryview]:
    """Yield the bytes of `(tensor + noise_scale * N(0, 1)) * scale`, computed in float32, as `dtype`.

    The noise depends only on the text `seed` and on numpy's generator, so that two runs agree; each piece of an output
    needs a seed of its own. Numbers are those of `torch.Tensor.to`; which bit pattern a NaN gets is left open.

    Args:
        source: a reader at the tensor's first byte.
        tensor: the tensor that is read.
        dtype: the dtype of the result.
        chunk_elements: how many elements are read, converted and yielded at once. A chunk is valid until the next.
        scale: a factor on the numbers and the noise.
        noise_scale: standard deviation of the noise.
        seed: the seed of the noise.

    Raises:
        CheckpointError: the source ends too early, or a finite weight is infinite in `dtype`.
    """
    total = tensor.nbytes // TYPES[tensor.dtype].itemsize
    elements = min(chunk_elements, total)
    stored, converted = np.empty(elements, TYPES[tensor.dtype]), np.empty(elements, TYPES[dtype])
    spare = np.empty(min(elements, BLOCK_ELEMENTS), np.uint32)
    chunk = _views(stored, converted, spare)
    if noise_scale == 0.0 and tensor.dtype != "F32":
        convert_block = _by_table(tensor, dtype, scale)
    else:
        convert_block = _by_arithmetic(tensor, dtype, scale, noise_scale, seed)
    for start in range(0, total, chunk_elements):
        if (rest := total - start) < elements:
            chunk = _views(stored[:rest], converted[:rest], spare)
        stored_bytes, blocks, converted_bytes = chunk
        fill(source, stored_bytes, tensor)
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is looked for
            for block in blocks:
                convert_block(*block)
        yield converted_bytes


def ended_inside(tensor: TensorInfo) -> CheckpointError:
    """The error for a source that is shorter than its header says."""
    return CheckpointError(f"{tensor.path}: ended inside tensor {tensor.name!r}: was it changed meanwhile?")


def fill(source: Readable, view: memoryview, tensor: TensorInfo) -> None:
    """Read until `view` is full; one read may give less.

    Raises:
        CheckpointError: the source ends too early.
    """
    while view:
        count = source.readinto(view)
        if count == 0:
            raise ended_inside(tensor)
        view = view[count or 0 :]


def _views(
    stored: Stored, converted: Stored, spare: NDArray[np.uint32]
) -> tuple[memoryview, list[tuple[Stored, Stored, NDArray[np.uint32]]], memoryview]:
    """Split buffers into views: a chunk's bytes to read, its blocks to convert, and its bytes to write."""
    spans = [slice(start, start + BLOCK_ELEMENTS) for start in range(0, len(stored), BLOCK_ELEMENTS)]
    blocks = [(stored[span], converted[span], spare[: len(stored[span])]) for span in spans]
    return stored.view(np.uint8).data, blocks, converted.view(np.uint8).data


def _by_table(
    tensor: TensorInfo, dtype: HeaderDType, scale: float
) -> Callable[[Stored, Stored, NDArray[np.uint32]], None]:
    """A function that converts a block of 16-bit floats by looking them up in a table."""
    floats, table = _tables(tensor.dtype, dtype, scale)
    may_overflow = bool(_overflows(floats, table, dtype).any())

    def convert_block(stored: Stored, result: Stored, spare: NDArray[np.uint32]) -> None:
        bits = stored.view(np.uint16)
        np.take(table, bits, out=result, mode="wrap")  # no index is out of range, and to make sure takes longer
        if may_overflow and not is_finite(result, dtype, spare):
            _refuse_overflow(floats[bits], result, tensor, dtype, changed=scale != 1.0)

    return convert_block


@lru_cache(maxsize=4)
def _tables(source: HeaderDType, dtype: HeaderDType, scale: float) -> tuple[NDArray[np.float32], Stored]:
    """All 16-bit floats in float32, and the stored form of each after conversion."""
    floats, table = np.empty(2**16, np.float32), np.empty(2**16, TYPES[dtype])
    widen(np.arange(2**16, dtype=np.uint16).view(TYPES[source]), source, floats)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow(floats * np.float32(scale), dtype, table, np.empty(2**16, np.uint32))
    return floats, table


def _by_arithmetic(
    tensor: TensorInfo, dtype: HeaderDType, scale: float, noise_scale: float, seed: str
) -> Callable[[Stored, Stored, NDArray[np.uint32]], None]:
    """A function that converts a block of numbers by computing them in float32."""
    generator = np.random.default_rng(zlib.crc32(seed.encode()))
    floats, noise = np.empty((2, BLOCK_ELEMENTS), np.float32)

    changes = noise_scale != 0.0 or scale != 1.0

    def convert_block(stored: Stored, result: Stored, spare: NDArray[np.uint32]) -> None:
        values = floats[: len(stored)]
        if tensor.dtype == "F32" and not changes:
            values = stored
        else:
            widen(stored, tensor.dtype, values)
        if noise_scale != 0.0:
            added = generator.standard_normal(out=noise[: len(stored)], dtype=np.float32)
            added *= np.float32(noise_scale)
            values += added
        if scale != 1.0:
            values *= np.float32(scale)
        if not narrow(values, dtype, result, spare):
            source = np.empty(len(stored), np.float32)
            widen(stored, tensor.dtype, source)
            _refuse_overflow(source, result, tensor, dtype, changed=changes)

    return convert_block


def _refuse_overflow(
    source: NDArray[np.float32], converted: Stored, tensor: TensorInfo, dtype: HeaderDType, *, changed: bool
) -> None:
    """Raise if a finite number of the source became infinite; the source's own infinities and NaNs may stay."""
    lost = _overflows(source, converted, dtype)
    if not lost.any():
        return
    largest = source[lost][np.abs(source[lost]).argmax()]
    what = f"{tensor.path}: tensor {tensor.name!r} holds {largest:g}, which"
    if changed:
        raise CheckpointError(
            f"{what} residual_scale or noise_scale make larger than {CONFIG_DTYPES[dtype]} can express. Choose a "
            f"smaller one{', or set `dtype: bfloat16`' if dtype == 'F16' else ''}."
        )
    raise TooLargeError(f"{what} {CONFIG_DTYPES[dtype]} cannot express", wider(dtype))


def wider(dtype: HeaderDType) -> str:
    """The advice for numbers that a stored dtype cannot express."""
    if dtype == "F32":
        return "Choose smaller factors"
    return f"Set {'`dtype: bfloat16` or ' if dtype == 'F16' else ''}`dtype: float32` in the config"


def _overflows(source: NDArray[np.float32], converted: Stored, dtype: HeaderDType) -> NDArray[np.bool_]:
    kept = np.empty(len(converted), np.float32)
    widen(converted, dtype, kept)
    return ~np.isfinite(kept) & np.isfinite(source)
