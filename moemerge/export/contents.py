"""Read a GGUF file's header: its settings, and name, sizes, type and offset of each tensor.

The package gguf is not used, since its reader makes objects of every token of a vocabulary: seconds and hundreds of MB.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moemerge.errors import CheckpointError, SourceError

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[dict[int, str]] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_ALIGNMENT: Final = 32
_MOST_DIMENSIONS: Final = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's entry in a GGUF file's header."""

    name: str
    sizes: tuple[int, ...]
    """Sizes with the length of a row first, then rows, then matrices of a stack."""
    type: int
    """Type as ggml numbers them: 0 is F32, 1 is F16."""
    offset: int
    """Offset from the file's start, in bytes."""


@dataclass(frozen=True)
class GgufContents:
    """The contents of a GGUF file."""

    path: Path
    nbytes: int
    """Size of the file in bytes."""
    settings: Mapping[str, Any]
    """Numbers and texts by key; arrays, such as the vocabulary, are left out."""
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The model's family, as llama.cpp calls it; empty where the file does not name it."""
        return str(self.settings.get("general.architecture", ""))


def read_contents(path: Path) -> GgufContents:
    """Read a GGUF file's header.

    Raises:
        SourceError: the file cannot be read.
        CheckpointError: the file is no GGUF file, or is damaged.
    """
    if path.exists() and not path.is_file():
        raise SourceError(f"{path}: is not a regular file. Name a GGUF file.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Header(path, mapped).contents()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}.") from error
    except (struct.error, ValueError, OverflowError) as error:  # beyond the end; an empty file; no UTF-8
        raise CheckpointError(f"{path}: is no GGUF file, or is damaged ({error}). Write it again.") from error


class _Header:
    """A reader of a header from its start to its end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path, self._mapped, self._place = path, mapped, 0

    def contents(self) -> GgufContents:
        magic, version = self._mapped[: len(_MAGIC)], struct.unpack_from("<I", self._mapped, len(_MAGIC))[0]
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError(f"begins with {magic!r} and version {version}")
        self._place = len(_MAGIC) + 4
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        found = {self._text(): self._value(self._number("<I")) for _ in range(key_count)}
        listed = [self._tensor() for _ in range(tensor_count)]
        alignment = found.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._place // alignment) * alignment
        placed = {name: GgufTensor(name, sizes, kind, start + offset) for name, sizes, kind, offset in listed}
        settings = {key: value for key, value in found.items() if value is not None}
        return GgufContents(self._path, len(self._mapped), settings, placed)

    def _number(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self._mapped, self._place)[0]
        self._place += struct.calcsize(layout)
        return value

    def _text(self) -> str:
        return self._bytes().decode()

    def _bytes(self) -> bytes:
        length = self._number("<Q")
        if length > len(self._mapped) - self._place:
            raise ValueError(f"a text of {length} bytes at {self._place} goes beyond its end")
        value = self._mapped[self._place : self._place + length]
        self._place += length
        return value

    def _value(self, kind: int) -> Any:
        """Read a number or text; None for an array, which is skipped."""
        if kind == _STRING:
            return self._bytes().decode(errors="replace")
        if kind != _ARRAY:
            return self._number(self._layout(kind))
        of, count = self._number("<I"), self._number("<Q")
        if of == _STRING:
            for _ in range(count):
                length = struct.unpack_from("<Q", self._mapped, self._place)[0]
                self._place += 8 + length
        else:
            self._place += struct.calcsize(self._layout(of)) * count
        if self._place > len(self._mapped):
            raise ValueError(f"an array of {count} values goes beyond its end")
        return None

    def _layout(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value at {self._place} is of the unknown type {kind}")
        return _SCALARS[kind]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        sizes = tuple(self._number("<Q") for _ in range(dimensions))
        return name, sizes, self._number("<I"), self._number("<Q")
