"""The bytes that a merge writes for a tensor, as a stream of bounded chunks, whatever the tensor is made of."""

import math
from collections.abc import Iterator

import numpy as np

from moemerge.checkpoint.convert import CHUNK_ELEMENTS, convert, fill
from moemerge.checkpoint.files import Readable
from moemerge.checkpoint.floats import TYPES, narrow
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Fill, Piece, with_seeds
from moemerge.checkpoint.regrouped import Heads, RegroupedReader
from moemerge.dtypes import HeaderDType, bytes_of


def tensor_chunks(bands: tuple[Band, ...], seed: int, name: str) -> Iterator[memoryview]:
    """Yield the bytes of the output tensor `name`; each chunk is valid until the next.

    Raises:
        CheckpointError: see `band_chunks`.
    """
    for band, seeds in with_seeds(bands, seed, name):
        yield from band_chunks(band, seeds)


def band_chunks(band: Band, seeds: list[str]) -> Iterator[memoryview]:
    """Yield the bytes of a band, with one noise seed for each piece; each chunk is valid until the next.

    Rows of pieces side by side are put together in memory, about `CHUNK_ELEMENTS` at a time and at least one row.

    Raises:
        CheckpointError: a source differs from its header, or a finite weight is infinite in the output's dtype.
    """
    if len(band) == 1:
        yield from _piece_chunks(band[0], seeds[0], CHUNK_ELEMENTS)
        return
    rows, widths = band[0].rows, [piece.row_bytes for piece in band]
    step = max(1, CHUNK_ELEMENTS // max(1, sum(piece.width for piece in band)))
    streams = [_piece_chunks(piece, seed, step * piece.width) for piece, seed in zip(band, seeds, strict=True)]
    together = np.empty((min(step, rows), sum(widths)), np.uint8)
    for start in range(0, rows, step):
        count, column = min(step, rows - start), 0
        for stream, width in zip(streams, widths, strict=True):
            if width:
                block = np.frombuffer(next(stream), np.uint8).reshape(count, width)
                together[:count, column : column + width] = block
            column += width
        yield together[:count].reshape(-1).data


def _piece_chunks(piece: Piece, seed: str, elements: int) -> Iterator[memoryview]:
    """Yield the bytes of a piece, in chunks of `elements` elements."""
    source = piece.source
    if isinstance(source, TensorInfo):
        with source.open() as file:
            reader = _regrouped(file, piece, source) if piece.head_rows else file
            if piece.changes_values:
                yield from convert(
                    reader, source, piece.dtype, elements, scale=piece.scale, noise_scale=piece.noise_scale, seed=seed
                )
            else:
                yield from _stored_chunks(reader, source, bytes_of(source.dtype, (elements,)) or 1)
        return
    chunk_bytes = bytes_of(piece.dtype, (elements,)) or 1
    if isinstance(source, bytes):
        for start in range(0, len(source), chunk_bytes):
            yield memoryview(source)[start : start + chunk_bytes]
    else:
        constant = memoryview(_encode(source, piece.dtype) * min(elements, math.prod(source.shape)))
        for start in range(0, piece.nbytes, chunk_bytes):
            yield constant[: piece.nbytes - start]


def _regrouped(file: Readable, piece: Piece, source: TensorInfo) -> RegroupedReader:
    heads = Heads(piece.head_rows, piece.rotated_rows or piece.head_rows, piece.into_pairs)
    return RegroupedReader(file, source, heads, source.nbytes // max(1, piece.rows))


def _stored_chunks(reader: Readable, source: TensorInfo, chunk_bytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(chunk_bytes, source.nbytes)))
    for start in range(0, source.nbytes, chunk_bytes):
        view = buffer[: min(chunk_bytes, source.nbytes - start)]
        fill(reader, view, source)
        yield view


def _encode(block: Fill, dtype: HeaderDType) -> bytes:
    """Encode one element of a constant block as it is stored."""
    stored = np.empty(1, TYPES[dtype])
    narrow(np.array([block.value], np.float32), dtype, stored, np.empty(1, np.uint32))
    return stored.tobytes()
