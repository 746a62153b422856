"""Casts, scales and noise, against torch's arithmetic on the whole tensor at once."""

import math
import zlib
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch

from moemerge.checkpoint.convert import BLOCK_ELEMENTS, CHUNK_ELEMENTS, convert
from moemerge.checkpoint.floats import round_to_half
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import CheckpointError

DTYPES = {stored: getattr(torch, name) for stored, name in CONFIG_DTYPES.items()}
SIZES = [
    0, 1, 15, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS,
    CHUNK_ELEMENTS + 1, 2 * CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 3 * BLOCK_ELEMENTS + 7,
]  # fmt: skip
SKIPPED = b"before it"


class ShortReads(FileIO):
    """As from a pipe or a network mount: never as much as was asked for."""

    def readinto(self, buffer):
        view = memoryview(buffer)
        return super().readinto(view[: max(1, len(view) // 2)])


def converted(
    folder: Path, values: torch.Tensor, dtype: str, opened=FileIO, chunk=CHUNK_ELEMENTS, **options
) -> torch.Tensor:
    source = folder / "source"
    source.write_bytes(SKIPPED + values.view(torch.uint8).numpy().tobytes())
    stored = next(name for name, other in DTYPES.items() if other == values.dtype)
    tensor = TensorInfo("a", source, stored, tuple(values.shape), len(SKIPPED), values.nbytes)
    with opened(source) as file:
        file.seek(tensor.start)
        chunks = [bytes(data) for data in convert(file, tensor, dtype, chunk, **options)]
    assert {len(data) // DTYPES[dtype].itemsize for data in chunks[:-1]} <= {chunk}
    data = b"".join(chunks)
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits, zeros' signs too; a NaN may be any NaN."""
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    equal = found.view(bits) == expected.view(bits)
    return found.dtype == expected.dtype and bool((equal | (found.isnan() & expected.isnan())).all())


def normal(size: int, dtype: str = "F32") -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DTYPES[dtype])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_any_size_is_cast_as_at_once(tmp_path, source, target):
    for size in SIZES:
        values = normal(size, source)
        assert same(converted(tmp_path, values, target), values.to(DTYPES[target])), size


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_every_kind_of_number_is_cast_as_at_once(tmp_path, source, target):
    bits = torch.arange(2**16, dtype=torch.int32)
    if source == "F32":  # each upper half, with lower halves on both sides of where rounding turns
        bits = torch.cat([bits << 16 | low for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = bits.to(torch.int32 if source == "F32" else torch.int16).view(DTYPES[source])
    whole = values.to(DTYPES[target])
    values = values[~(whole.isinf() & values.isfinite())]  # those are refused
    expected = values.to(DTYPES[target])
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert same(converted(tmp_path, values, target), expected)


@pytest.mark.parametrize(("chunk", "block"), [(7, 7), (64, 16), (50, 16), (CHUNK_ELEMENTS, BLOCK_ELEMENTS)])
def test_sizes_of_chunks_do_not_matter(tmp_path, monkeypatch, chunk, block):
    monkeypatch.setattr("moemerge.checkpoint.convert.BLOCK_ELEMENTS", block)
    for size in (0, 1, 6, 7, 8, 49, 50, 51, 200):
        values = normal(size)
        assert same(converted(tmp_path, values, "BF16", chunk=chunk), values.bfloat16())
        assert same(converted(tmp_path, values, "F16", chunk=chunk, scale=0.3), (values * 0.3).half())


def test_short_reads_are_completed(tmp_path):
    values = normal(CHUNK_ELEMENTS + 5)
    assert same(converted(tmp_path, values, "BF16", ShortReads), values.bfloat16())


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_noise_and_scale_are_computed_in_float32_with_one_stream_of_noise(tmp_path, source, target):
    values = normal(2 * CHUNK_ELEMENTS + BLOCK_ELEMENTS + 32, source)
    generator = np.random.default_rng(zlib.crc32(b"5 a"))
    noisy = values.float() + 0.1 * torch.from_numpy(generator.standard_normal(len(values), np.float32))
    both = converted(tmp_path, values, target, scale=0.3, noise_scale=0.1, seed="5 a")
    assert same(both, (noisy * 0.3).to(DTYPES[target]))
    assert same(converted(tmp_path, values, target, noise_scale=0.1, seed="5 a"), noisy.to(DTYPES[target]))
    assert same(converted(tmp_path, values, target, scale=0.3), (values.float() * 0.3).to(DTYPES[target]))


@pytest.mark.parametrize(
    ("source", "value", "target", "scale"),
    [
        ("F32", 65520.0, "F16", 1.0),
        ("F32", -70000.0, "F16", 1.0),
        ("BF16", 2.0**16, "F16", 1.0),
        ("F16", 60000.0, "F16", 2.0),
        ("F32", -3.4e38, "BF16", 1.0),
        ("BF16", 2.0**127, "BF16", 1.9999),
        ("F32", 2.0**127, "F32", 2.0),
        ("F32", -3.0e38, "BF16", 1.0e30),
        ("BF16", 2.0**100, "F32", 1.0e30),
    ],
)
def test_an_overflow_anywhere_is_found(tmp_path, source, value, target, scale):
    size = 2 * CHUNK_ELEMENTS + 7
    for place in (0, 1, BLOCK_ELEMENTS, CHUNK_ELEMENTS - 1, 2 * CHUNK_ELEMENTS, size - 1):
        values = normal(size, source)
        values[place] = value
        values[place - 1], values[(place + 1) % size] = math.inf, math.nan  # allowed, and hide nothing
        with pytest.raises(CheckpointError) as caught:
            converted(tmp_path, values, target, scale=scale)
        wider = "`dtype: bfloat16` or `dtype: float32`" if target == "F16" else "`dtype: float32`"
        why = f"{CONFIG_DTYPES[target]} cannot express. Set {wider} in the config."
        if scale != 1.0:
            other = ", or set `dtype: bfloat16`" if target == "F16" else ""
            why = f"residual_scale or noise_scale make larger than {CONFIG_DTYPES[target]} can express. Choose a smaller one{other}."
        assert str(caught.value) == f"{tmp_path / 'source'}: tensor 'a' holds {value:g}, which {why}"


def test_the_largest_number_of_a_dtype_is_kept(tmp_path):
    values = torch.tensor([65504.0, -65504.0, 65519.99, math.inf, -math.inf, math.nan])
    assert same(converted(tmp_path, values, "F16"), values.half())
    values = torch.tensor([3.3895313892515355e38, -3.3895313892515355e38, math.inf, -math.inf, math.nan])
    assert same(converted(tmp_path, values, "BF16"), values.bfloat16())


@pytest.mark.parametrize("bits", [(0, 0x477FEFFF), (0x33000000, 0x39000000), (0, 0x100), (0x477FE000, 0x477FF000)])
def test_numbers_are_rounded_to_float16_in_float32_as_by_a_cast(bits):
    rng = np.random.default_rng(0)
    drawn = rng.integers(bits[0], bits[1] + 1, 2**16, np.uint32)
    drawn[::3] &= 0xFFFFF000  # half of these lie in the middle between two numbers of float16
    drawn |= rng.integers(0, 2, len(drawn), np.uint32) << 31
    with np.errstate(over="ignore"):
        expected = drawn.view(np.float32).astype(np.float16).astype(np.float32)
        round_to_half(drawn.view(np.float32), np.empty(len(drawn), np.uint32))
    assert np.array_equal(drawn, expected.view(np.uint32))
