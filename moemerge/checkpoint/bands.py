"""What a merge writes for a tensor, as a stream: one bounded chunk at a time, whatever its pieces are."""

import math
from collections.abc import Iterator
from io import FileIO

import numpy as np

from moemerge.checkpoint.convert import CHUNK_ELEMENTS, Readable, convert, fill
from moemerge.checkpoint.floats import TYPES, narrow
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.pieces import Band, Fill, Piece, with_seeds
from moemerge.dtypes import bytes_of
from moemerge.errors import CheckpointError


def tensor_chunks(bands: tuple[Band, ...], seed: int, name: str) -> Iterator[memoryview]:
    """The bytes of the output tensor `name`; each chunk is valid until the next.

    Raises:
        CheckpointError: see `band_chunks`.
    """
    for band, seeds in with_seeds(bands, seed, name):
        yield from band_chunks(band, seeds)


def band_chunks(band: Band, seeds: list[str]) -> Iterator[memoryview]:
    """The bytes of a band, of each piece with its seed; each chunk is valid until the next.

    Rows of pieces side by side are put together in memory, some `CHUNK_ELEMENTS` at a time, at least one row.

    Raises:
        CheckpointError: a source is not what its header said, or a finite weight is infinite in the output's dtype.
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


def open_source(source: StoredTensor) -> FileIO:
    """Open the file of a tensor.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return source.path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{source.path}: cannot be read: {error.strerror}. Was it moved meanwhile?") from error


def _piece_chunks(piece: Piece, seed: str, elements: int) -> Iterator[memoryview]:
    """The bytes of a piece, in chunks of so many elements."""
    source = piece.source
    if isinstance(source, StoredTensor):
        with open_source(source) as file:
            file.seek(source.start)
            reader = _Regrouped(file, piece, source) if piece.head_rows else file
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


def _stored_chunks(reader: Readable, source: StoredTensor, chunk_bytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(chunk_bytes, source.nbytes)))
    for start in range(0, source.nbytes, chunk_bytes):
        view = buffer[: min(chunk_bytes, source.nbytes - start)]
        fill(reader, view, source)
        yield view


def _encode(block: Fill, dtype: str) -> bytes:
    """One element of a constant block, as it is stored."""
    stored = np.empty(1, TYPES[dtype])
    narrow(np.array([block.value], np.float32), dtype, stored, np.empty(1, np.uint32))
    return stored.tobytes()


class _Regrouped:
    """A tensor's bytes with the even rows of every head before its odd ones."""

    def __init__(self, file: FileIO, piece: Piece, source: StoredTensor) -> None:
        self._file, self._start, self._head_rows = file, source.start, piece.head_rows
        self._row_bytes, self._done = source.nbytes // max(1, piece.rows), 0

    def readinto(self, view: memoryview, /) -> int | None:
        """Read no further than to the end of a row."""
        row, inside = divmod(self._done, self._row_bytes)
        head, place = divmod(row, self._head_rows)
        odd, pair = divmod(place, self._head_rows // 2)
        row = head * self._head_rows + 2 * pair + odd
        self._file.seek(self._start + row * self._row_bytes + inside)
        count = self._file.readinto(view[: self._row_bytes - inside])
        self._done += count or 0
        return count
