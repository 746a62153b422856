"""Output tensors made of several pieces, against torch's own slices, stacks and columns."""

import math
import os
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moemerge.checkpoint import bands as streams
from moemerge.checkpoint.bands import tensor_chunks
from moemerge.checkpoint.column_slice import ColumnSlice
from moemerge.checkpoint.compare import compare_tensor
from moemerge.checkpoint.convert import CHUNK_ELEMENTS
from moemerge.checkpoint.derived import leaves, plus
from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checkpoint.joined import joined, joined_columns
from moemerge.checkpoint.memory import held_by_bands
from moemerge.checkpoint.packed import Packed
from moemerge.checkpoint.pieces import Band, Fill, Piece, band_bytes, measure, piece_at, with_seeds
from moemerge.checkpoint.regrouped import Heads, Regrouped
from moemerge.checkpoint.shards import TensorSpec, layout_shards
from moemerge.checkpoint.transposed import Transposed
from moemerge.checkpoint.writer import ShardWriter
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import CheckpointError
from moemerge.planning.output import Computed, Output

DTYPES = {stored: getattr(torch, name) for stored, name in CONFIG_DTYPES.items()}


def save(folder: Path, **tensors: torch.Tensor) -> dict[str, TensorInfo]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "source.safetensors")
    return read_header(folder / "source.safetensors")


def normal(*shape: int, dtype: str = "F32") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(DTYPES[dtype])


def block(piece: Piece, values: torch.Tensor | None, seed: str) -> torch.Tensor:
    """(rows, width) that a merge should write for a piece; `values` is its source."""
    if isinstance(piece.source, Fill):
        return torch.full((piece.rows, piece.width), piece.source.value, dtype=DTYPES[piece.dtype])
    assert values is not None
    rows = values.reshape(piece.rows, piece.width)
    if piece.head_rows:
        heads = rows.unflatten(0, (-1, piece.head_rows))
        turned = heads[:, : piece.rotated_rows or piece.head_rows]
        still = heads[:, turned.shape[1] :]
        rows = torch.cat([turned[:, 0::2], turned[:, 1::2], still], 1).flatten(0, 1)
    if not piece.changes_values:
        return rows
    floats = rows.float()
    if piece.noise_scale:
        noise = np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(floats.numel(), np.float32)
        floats = floats + piece.noise_scale * torch.from_numpy(noise).reshape(floats.shape)
    return (floats * piece.scale).to(DTYPES[piece.dtype])


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def write(folder: Path, name: str, bands: tuple[Band, ...], **keys) -> tuple[bytes, TensorInfo]:
    """What a merge writes for a tensor that lies between two others in a file full of old bytes."""
    dtype, nbytes = bands[0][0].dtype, measure(bands)
    width = DTYPES[dtype].itemsize
    shapes = {"before": 2, name: nbytes // width, "behind": 3}
    tensors = [TensorSpec(one, dtype, (size,), size * width) for one, size in shapes.items()]
    (shard,) = layout_shards(tensors, 10**9)
    before, behind = b"\x55" * 2 * width, b"\x66" * 3 * width
    reported = []
    with ShardWriter(folder, [shard], reported.append, seed=7, **keys) as writer:
        (folder / shard.name).write_bytes(shard.header + b"\xaa" * (shard.nbytes - len(shard.header)))
        writer.add({name: bands})
        writer.add({"before": ((Piece(before, dtype),),), "behind": ((Piece(behind, dtype),),)})
    data = (folder / shard.name).read_bytes()
    start = shard.starts[name]
    assert data == shard.header + before + data[start : start + nbytes] + behind
    assert sum(reported) == shard.nbytes - len(shard.header)
    return data[start : start + nbytes], TensorInfo(name, folder / shard.name, dtype, (nbytes // width,), start, nbytes)


def check(folder: Path, bands: tuple[Band, ...], expected: torch.Tensor) -> None:
    """Written as expected, found equal by a comparison, and unequal after one bit of any piece has changed."""
    for low_memory in (False, True):
        data, found = write(folder, "t", bands, low_memory=low_memory)
        assert data == raw(expected)
    assert compare_tensor(bands, 7, found, lambda _: None) is None
    pieces = [piece for band in bands for piece in band]
    places = {piece_at(bands, byte)[0]: byte for byte in range(0, len(data), max(1, len(data) // 997))}
    places |= {piece_at(bands, byte)[0]: byte for byte in (len(data) - 1, 0)}
    assert set(places) == {number for number, piece in enumerate(pieces) if piece.nbytes}
    for byte in places.values():
        with found.path.open("r+b") as file:
            file.seek(found.start + byte)
            file.write(bytes([data[byte] ^ 1]))
        shown = []
        unequal = compare_tensor(bands, 7, found, shown.append)
        assert str(unequal) == f"1 of {len(data)} bytes differ, the first at byte {byte}"
        assert sum(shown) == len(data)
        with found.path.open("r+b") as file:
            file.seek(found.start + byte)
            file.write(data[byte : byte + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_stacked(tmp_path, dtype):
    """As [expert, gate rows then up rows, hidden] from dense models and from a fused one."""
    gate, up, fused = normal(6, 5), normal(6, 5) * 2, normal(2, 12, 5)
    stored = save(tmp_path, gate=gate, up=up, fused=fused.reshape(24, 5))
    bands = (
        (Piece(stored["gate"], dtype),),
        (Piece(stored["up"], dtype),),
        (Piece(stored["fused"].rows(18, 6), dtype),),
        (Piece(stored["fused"].rows(0, 6), dtype),),
    )
    expected = torch.stack([torch.cat([gate, up]), torch.cat([fused[1, 6:], fused[0, :6]])])
    check(tmp_path, bands, expected.to(DTYPES[dtype]))


def test_columns_of_every_kind_lie_side_by_side(tmp_path):
    wide, half, brain = normal(9, 7), normal(9, 4, dtype="F16"), normal(9, 3, dtype="BF16")
    stored = save(tmp_path, wide=wide, half=half, brain=brain)
    for dtype in DTYPES:
        band = (
            Piece(stored["wide"], dtype, 0.5, 0.1),
            Piece(stored["half"], dtype),
            Piece(Fill(0.0, (9, 5)), dtype),
            Piece(stored["brain"], dtype, 3.0),
            Piece(stored["half"], dtype, noise_scale=0.2),
            Piece(Fill(-1e4, (9, 1)), dtype),
        )
        values = [wide, half, None, brain, half, None]
        texts = ["7 t", *(f"7 t {number}" for number in range(1, 6))]
        check(tmp_path, (band,), torch.cat([block(*one) for one in zip(band, values, texts, strict=True)], 1))
        # One under another, with rows of another kind between them.
        between = Piece(Fill(1.0, (2, 23)), dtype)
        texts = [f"7 t {number}" for number in range(7, 13)]
        again = torch.cat([block(*one) for one in zip(band, values, texts, strict=True)], 1)
        data, _ = write(tmp_path, "t", (band, (between,), band))
        assert data[-len(raw(again)) :] == raw(again)


@pytest.mark.parametrize(("dtype", "one"), [("F32", 0x3F800000), ("F16", 0x3C00), ("BF16", 0x3F80)])
def test_a_constant_is_written_as_its_dtype_over_what_was_there(tmp_path, dtype, one):
    size = 2 * CHUNK_ELEMENTS + 3
    for value in (0.0, -0.0, 1.0, -1e4, 1 / 3, -math.inf):
        bands = ((Piece(Fill(value, (size,)), dtype, 2.0, 0.5),),)
        data, found = write(tmp_path, "t", bands)
        assert data == raw(torch.full((size,), value, dtype=DTYPES[dtype]))
        assert compare_tensor(bands, 7, found, lambda _: None) is None
    width = 4 if dtype == "F32" else 2
    assert write(tmp_path, "t", ((Piece(Fill(1.0, ()), dtype),),))[0] == one.to_bytes(width, "little")


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", [(12, 5), (12,), (24, 3, 2)])
def test_rows_of_heads_are_regrouped(tmp_path, source, target, shape):
    values = normal(*shape, dtype=source)
    stored = save(tmp_path, a=values)["a"]
    for head_rows, rotated in ((2, 0), (4, 0), (4, 2), (6, 0), (12, 0), (12, 4), (3, 2)):
        kept = Piece(stored, target, head_rows=head_rows, rotated_rows=rotated)
        for piece in (kept, replace(kept, scale=0.5, noise_scale=0.1)):
            check(tmp_path, ((piece,),), block(piece, values, "7 t"))
    piece = Piece(stored, target, head_rows=4)
    check(
        tmp_path,
        ((piece, Piece(Fill(0.0, (piece.rows, 2)), target)),),
        torch.nn.functional.pad(block(piece, values, ""), (0, 2)),
    )


def test_what_is_made_of_stored_bytes_is_not_unchanged(tmp_path):
    stored = save(tmp_path, a=normal(8, 6), b=normal(8, 6))
    matrix, other = stored.values()
    compressed = Packed(matrix, 0, (6, 1), negated=False, checksum=7, record_bytes=matrix.nbytes)
    made = (
        ColumnSlice(matrix, 2, 3).tensor(),
        joined_columns("c", [matrix, other]),
        joined("c", [other, matrix]),
        Regrouped(matrix, Heads(4, 4)).tensor(),
        Transposed(matrix).tensor(),
        plus(matrix, 1.0),
        compressed.tensor(),
    )
    assert [Piece(tensor, "F32").is_unchanged for tensor in made] == [False] * len(made)
    assert all(Piece(tensor, "F32").is_unchanged for tensor in (matrix, matrix.rows(2, 4)))


def test_matrices_that_are_held_as_a_whole_are_counted(tmp_path):
    stored = save(tmp_path, a=normal(4096, 2048), b=normal(4096, 2048))
    turned = [Transposed(matrix).tensor() for matrix in stored.values()]
    whole = stored["a"].nbytes
    for band, held in (
        ((Piece(turned[0], "F32"),), whole),
        ((Piece(turned[0], "F32"), Piece(stored["b"].rows(0, 2048), "F32")), whole),
        (tuple(Piece(matrix, "F32") for matrix in turned), 2 * whole),
    ):
        assert held_by_bands((band, (Piece(stored["a"], "F32"),))) == held
        tracemalloc.start()
        for _ in tensor_chunks((band,), 7, "t"):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held <= peak < 1.5 * held
    assert held_by_bands(((Piece(joined_columns("c", turned), "F32"),),)) == 2 * whole


def test_regrouping_is_the_order_of_halves():
    piece = Piece(TensorInfo("a", Path("a"), "F32", (8,), 0, 32), "F32", head_rows=4)
    assert block(piece, torch.arange(8.0), "").flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert not piece.is_unchanged
    assert not piece.changes_values


@pytest.mark.parametrize(("source", "target"), [("F32", "F32"), ("BF16", "F32")])
def test_regrouping_into_pairs_is_the_way_back(tmp_path, source, target):
    values = normal(24, 6, dtype=source)
    stored = save(tmp_path, a=values)["a"]
    for head_rows in (2, 4, 12, 24):
        piece = Piece(stored, target, head_rows=head_rows, into_pairs=True)
        pairs = values.unflatten(0, (-1, 2, head_rows // 2)).transpose(1, 2).flatten(0, 2)
        check(tmp_path, ((piece,),), pairs.to(DTYPES[target]))


@pytest.mark.parametrize("rotated", [4, 6])
def test_heads_that_were_regrouped_are_read_as_they_were(tmp_path, rotated):
    values = normal(18, 5, dtype="BF16")
    piece = Piece(save(tmp_path, a=values)["a"], "BF16", head_rows=6, rotated_rows=rotated)
    stored = save(tmp_path, a=block(piece, values, ""))["a"]
    again = Regrouped(stored, Heads(6, rotated, into_pairs=True)).tensor()
    assert (again.name, again.dtype, again.shape, again.nbytes) == ("a", "BF16", (18, 5), stored.nbytes)
    assert list(leaves(again)) == [stored]
    for first, count in ((0, 18), (2, 9), (6, 6), (17, 1)):
        with again.rows(first, count).open() as reader:
            assert bytes(read_exactly(reader, count * 10)) == raw(values[first : first + count])


def test_any_bits_of_any_dtype_pass(tmp_path):
    """Also what cannot be converted, and not-a-numbers with something inside."""
    numbers = torch.arange(-60, 60).reshape(12, 10)
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    stored = save(tmp_path, numbers=numbers, bits=bits)
    piece = Piece(stored["numbers"], "I64", head_rows=4)
    assert b"".join(map(bytes, tensor_chunks(((piece, piece),), 0, "t"))) == raw(
        torch.cat([block(piece, numbers, "")] * 2, 1)
    )
    pair = (Piece(stored["bits"], "BF16"), Piece(stored["bits"], "BF16", head_rows=256))
    check(tmp_path, (pair,), torch.cat([block(piece, bits, "") for piece in pair], 1))


@pytest.mark.parametrize(
    "widths", [(300, 100), (1, 1), (CHUNK_ELEMENTS, 1), (CHUNK_ELEMENTS // 2, CHUNK_ELEMENTS // 2), (333, 7), (0, 5)]
)
def test_borders_of_chunks_do_not_show(tmp_path, widths):
    rows = 2 * CHUNK_ELEMENTS // sum(widths) + 3
    values = [normal(rows, widths[0]), normal(rows, widths[1], dtype="BF16")]
    stored = save(tmp_path, a=values[0], b=values[1])
    band = (Piece(stored["a"], "BF16", noise_scale=0.1), Piece(stored["b"], "BF16"))
    expected = [block(piece, value, text) for piece, value, text in zip(band, values, ("7 t", "7 t 1"), strict=True)]
    data, found = write(tmp_path, "t", (band,))
    assert data == raw(torch.cat(expected, 1))
    assert compare_tensor((band,), 7, found, lambda _: None) is None


def test_reports_come_often_and_memory_stays_small(tmp_path):
    stored = save(tmp_path, a=torch.zeros(3000, 4000), b=torch.zeros(3000, 500, dtype=torch.bfloat16))
    bands = (
        (Piece(stored["a"], "BF16", 2.0), Piece(stored["b"], "BF16"), Piece(Fill(0.0, (3000, 700)), "BF16")),
        (Piece(Fill(0.0, (3000, 5200)), "BF16"),),
    )
    tracemalloc.start()
    largest = max(len(chunk) for chunk in tensor_chunks(bands, 7, "t"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest <= 2 * CHUNK_ELEMENTS
    assert peak < 3 * 2**20 < measure(bands) // 10


@pytest.mark.parametrize("kind", ["copied", "cast", "regrouped", "column"])
def test_a_source_cut_off_after_the_plan_is_the_same_error(tmp_path, kind):
    stored = save(tmp_path, a=normal(10, 8))["a"]
    band = {
        "copied": (Piece(stored, "F32"),),
        "cast": (Piece(stored, "BF16"),),
        "regrouped": (Piece(stored, "F32", head_rows=10),),
        "column": (Piece(Fill(0.0, (10, 2)), "F32"), Piece(stored, "F32")),
    }[kind]
    _, found = write(tmp_path, "t", (band,))
    os.truncate(stored.path, stored.start + stored.nbytes - 3)
    message = f"{stored.path}: ended inside tensor 'a': was it changed meanwhile?"
    for attempt in (lambda: write(tmp_path, "t", (band,)), lambda: compare_tensor((band,), 7, found, lambda _: None)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == message


@st.composite
def layouts(draw):
    """Bands as lists of (kind, rows, width, source dtype, scale, noise, head rows, rotated), and the output's dtype."""
    bands = []
    for _ in range(draw(st.integers(1, 4))):
        heads, head_rows = draw(st.integers(0, 3)), draw(st.sampled_from([2, 4, 6]))
        bands.append(
            [
                (
                    draw(st.sampled_from(["stored", "stored", "fill"])),
                    heads * head_rows,
                    draw(st.integers(0, 9)),
                    draw(st.sampled_from(list(DTYPES))),
                    draw(st.sampled_from([1.0, 1.0, 0.5])),
                    draw(st.sampled_from([0.0, 0.0, 0.25])),
                    (regroups := draw(st.sampled_from([0, head_rows]))),
                    draw(st.sampled_from([0, 2])) if regroups else 0,
                )
                for _ in range(draw(st.integers(1, 4)))
            ]
        )
    return draw(st.sampled_from(list(DTYPES))), bands


@settings(deadline=None, max_examples=60)
@given(layouts(), st.sampled_from([1, 7, 16, CHUNK_ELEMENTS]), st.booleans())
def test_any_layout_is_what_torch_makes_of_it(tmp_path_factory, layout, chunk, low_memory):
    dtype, rows_of_blocks = layout
    folder = tmp_path_factory.mktemp("layout")
    made = [normal(rows, width, dtype=source) for band in rows_of_blocks for _, rows, width, source, *_ in band]
    stored = save(folder, **{str(number): tensor for number, tensor in enumerate(made)})
    bands, expected, number = [], [], 0
    for blocks in rows_of_blocks:
        band, side_by_side = [], []
        for kind, rows, width, _, scale, noise, head_rows, rotated in blocks:
            piece = (
                Piece(Fill(1.5, (rows, width)), dtype)
                if kind == "fill"
                else Piece(stored[str(number)], dtype, scale, noise, head_rows, rotated_rows=rotated)
            )
            band.append(piece)
            side_by_side.append(block(piece, made[number], f"7 t {number}" if number else "7 t"))
            number += 1
        bands.append(tuple(band))
        expected.append(raw(torch.cat(side_by_side, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK_ELEMENTS", chunk)
        data, found = write(folder, "t", tuple(bands), low_memory=low_memory)
        assert compare_tensor(tuple(bands), 7, found, lambda _: None) is None
    assert data == b"".join(expected)
    for byte in range(0, len(data), 37):
        place, piece = piece_at(tuple(bands), byte)
        assert [one for band in bands for one in band][place] is piece


def test_rows_of_a_tensor_are_a_part_of_its_bytes():
    tensor = TensorInfo("a", Path("file"), "BF16", (6, 2, 5), 100, 120)
    assert tensor.rows(2, 3) == TensorInfo("a", Path("file"), "BF16", (3, 2, 5), 140, 60)
    assert tensor.rows(0, 6) == tensor
    assert tensor.rows(6, 0).nbytes == 0
    assert tensor.rows(1, 4).rows(1, 2) == tensor.rows(2, 2)
    for first, count in ((5, 2), (-1, 2), (2, -1), (7, 0)):
        with pytest.raises(ValueError, match=f"^a: no {count} rows from row {first} on in a tensor of shape"):
            tensor.rows(first, count)
    with pytest.raises(ValueError, match="no 0 rows"):
        TensorInfo("a", Path("file"), "F32", (), 0, 4).rows(0, 0)
    with pytest.raises(ValueError, match="a: 1 rows from row 1 on are not whole bytes of F4"):
        TensorInfo("a", Path("file"), "F4", (2, 3), 0, 3).rows(1, 1)


def test_what_does_not_fit_is_refused(tmp_path):
    tensor = TensorInfo("a", tmp_path / "a", "F32", (6, 2), 0, 48)
    for source, head_rows in ((tensor, 3), (tensor, 4), (tensor, -2), (Fill(0.0, (6,)), 2), (b"12345678", 2)):
        with pytest.raises(ValueError, match=f"cannot be regrouped by {head_rows}$"):
            Piece(source, "F32", head_rows=head_rows)
    for rotated in (3, 8, -2):
        with pytest.raises(ValueError, match="cannot be regrouped by 6$"):
            Piece(tensor, "F32", head_rows=6, rotated_rows=rotated)
    piece, other = Piece(tensor, "F32"), Piece(Fill(0.0, (5, 2)), "F32")
    with pytest.raises(ValueError, match=r"pieces of \[6, 5\] rows cannot lie side by side"):
        measure(((piece, other),))
    with pytest.raises(ValueError, match="differ in their dtypes"):
        measure(((piece,), (Piece(tensor, "F16"),)))
    with pytest.raises(ValueError, match=r"F4 \[3\] does not fill whole bytes"):
        measure(((Piece(TensorInfo("b", tmp_path, "F4", (2, 3), 0, 3), "F4"),) * 2,))
    with pytest.raises(ValueError, match="byte 48 lies behind"):
        piece_at(((piece,),), 48)
    shards = layout_shards([TensorSpec("t", "F32", (13,), 52)], 100)
    with pytest.raises(ValueError, match="t: 48 bytes for a place of 52"), ShardWriter(tmp_path, shards, print) as one:
        one.add({"t": ((piece,),)})


def test_an_output_knows_its_pieces(tmp_path):
    tensor = TensorInfo("a", tmp_path / "a", "F32", (6, 2), 0, 48)
    piece, cast, zeros = Piece(tensor, "F32"), Piece(tensor, "F16"), Piece(Fill(0.0, (6, 2)), "F32")
    assert Output((6, 2), ((piece,),)).copied_from == tensor
    for bands in (((piece,), (piece,)), ((piece, piece),), ((cast,),), ((zeros,),)):
        assert Output((6, 2), bands).copied_from is None
    assert [
        Output((6, 2), bands).is_converted for bands in (((piece, piece),), ((piece,), (zeros,)), Computed(3, "router"))
    ] == [
        False,
        True,
        False,
    ]
    assert Output((12, 2), ((piece,), (zeros, cast))).pieces == [piece, zeros, cast]
    assert band_bytes((piece, cast)) == 72
    assert [texts for _, texts in with_seeds(((piece,), (piece, cast)), 3, "t")] == [["3 t"], ["3 t 1", "3 t 2"]]


def test_a_transpose_keeps_the_matrix_that_it_is_read_from(tmp_path):
    """Routers read an expert's weights again, and each reading needs all of a matrix on the Hub."""
    kept = []

    class Elsewhere:
        def keep(self, folder: Path, start: int, nbytes: int) -> None:
            kept.append((folder, start, nbytes))

    matrix = TensorInfo("w", Elsewhere(), "F32", (4, 6), 64, 96)
    Transposed(matrix).tensor().rows(2, 1).keep(tmp_path)
    assert kept == [(tmp_path, 64, 96)]
