"""Read the pieces of a SentencePiece model from its file, without the library.

The file is a message of protocol buffers:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from moemerge.errors import CheckpointError

_PIECES: Final = 1
_TEXT, _SCORE, _KIND = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS: Final = {_FIXED64: 8, _FIXED32: 4}


class Kind(IntEnum):
    """The kind of a piece; kinds that are not listed are texts like a normal one."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A piece of text."""

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[SentencePiece]:
    """Read all pieces of a model, in the order of their numbers.

    Raises:
        CheckpointError: the file cannot be read, or is no such model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}.") from error
    try:
        return [_piece(value) for number, value in _fields(data) if number == _PIECES and isinstance(value, bytes)]
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path.name}: is no SentencePiece model ({error!s:.60}). Download it again.") from error


def _piece(message: bytes) -> SentencePiece:
    text, score, kind = "", 0.0, int(Kind.NORMAL)
    for number, value in _fields(message):
        if number == _TEXT and isinstance(value, bytes):
            text = value.decode()
        elif number == _SCORE and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == _KIND and isinstance(value, int):
            kind = value
    return SentencePiece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield each field of a message: its number, and an integer or bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == _BYTES:
            width, place = _varint(message, place)
        elif wire in _WIDTHS:
            width = _WIDTHS[wire]
        else:
            raise ValueError(f"a field of wire type {wire}")
        if place + width > len(message):
            raise ValueError("it is cut off")
        yield number, message[place : place + width]
        place += width


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Decode a number of 7 bits a byte, the lowest first; returns it and where it ends."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:  # noqa: PLR2004  the last one
            return value, place
        if shift > 63:  # noqa: PLR2004
            raise ValueError("a number without an end")
