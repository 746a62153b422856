"""Read a GGUF file's header: its settings, and name, sizes, type and offset of each tensor.

The package gguf is not used, since its reader makes objects of every token of a vocabulary: seconds and hundreds of MB.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.files import File, open_range, read_exactly, size_of
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
# Vocabularies have some hundred thousand tokens, and mixtures some thousand tensors.
_MOST_VALUES: Final = 2**23
_MOST_ENTRIES: Final = 2**20
_FIRST_READ: Final = 2**22


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
class GgufArray:
    """An array in a GGUF file's header."""

    kind: int
    """Type of its values as GGUF numbers them: 8 is a text."""
    count: int
    start: int
    """Offset of its first value, in bytes."""


@dataclass(frozen=True)
class GgufContents:
    """The contents of a GGUF file."""

    path: File
    nbytes: int
    """Size of the file in bytes."""
    settings: Mapping[str, Any]
    """Numbers and texts by key; arrays, such as the vocabulary, are in `arrays`."""
    arrays: Mapping[str, GgufArray]
    """Arrays by key; `values` reads them."""
    tensors: Mapping[str, GgufTensor]
    header: bytes
    """The file's bytes up to the first tensor's entry."""

    @property
    def architecture(self) -> str:
        """The model's family, as llama.cpp calls it; empty where the file does not name it."""
        return str(self.settings.get("general.architecture", ""))

    def values(self, key: str) -> list[Any]:
        """Read the values of an array; empty where there is none."""
        array = self.arrays.get(key)
        if array is None:
            return []
        if array.kind != _STRING:
            layout = f"<{array.count}{_SCALARS[array.kind][1]}"
            return list(struct.unpack_from(layout, self.header, array.start))
        texts, place = [], array.start
        for _ in range(array.count):
            (length,) = struct.unpack_from("<Q", self.header, place)
            place += 8 + length
            texts.append(self.header[place - length : place].decode(errors="replace"))
        return texts


def read_contents(path: File) -> GgufContents:
    """Read a GGUF file's header; of a file on another machine, its first megabytes.

    Raises:
        SourceError: the file cannot be read.
        CheckpointError: the file is no GGUF file, or is damaged.
    """
    try:
        if not isinstance(path, Path):
            return _read_beginning(path)
        if path.exists() and not path.is_file():
            raise SourceError(f"{path}: is not a regular file. Name a GGUF file.")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Header(path, mapped, len(mapped)).contents()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}.") from error
    except (struct.error, ValueError, OverflowError) as error:  # beyond the end; an empty file; no UTF-8
        raise CheckpointError(f"{path}: is no GGUF file, or is damaged ({error}). Write it again.") from error


def _read_beginning(file: File) -> GgufContents:
    """Read as much of a file on another machine as its header takes; each byte once."""
    total, data = size_of(file), b""
    while True:
        wanted = min(max(_FIRST_READ, 2 * len(data)), total) - len(data)
        if wanted:
            with open_range(file, len(data), wanted) as reader:
                data += read_exactly(reader, wanted)
        try:
            return _Header(file, data, total).contents()
        except _UnreadError:
            continue


class _UnreadError(Exception):
    """The header goes on behind what was read of the file."""


class _Header:
    """A reader of a header from its start to its end."""

    def __init__(self, path: File, data: mmap.mmap | bytes, total: int) -> None:
        self._path, self._data, self._total, self._place = path, data, total, 0

    def contents(self) -> GgufContents:
        magic, version = bytes(self._take(len(_MAGIC))), self._number("<I")
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError(f"begins with {magic!r} and version {version}")
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        if max(tensor_count, key_count) > _MOST_ENTRIES:
            raise ValueError(f"announces {tensor_count} tensors and {key_count} keys")
        found = {self._text(): self._value(self._number("<I")) for _ in range(key_count)}
        header = bytes(self._data[: self._place])
        listed = [self._tensor() for _ in range(tensor_count)]
        arrays = {key: value for key, value in found.items() if isinstance(value, GgufArray)}
        settings = {key: value for key, value in found.items() if key not in arrays}
        alignment = settings.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._place // alignment) * alignment
        placed = {name: GgufTensor(name, sizes, kind, start + offset) for name, sizes, kind, offset in listed}
        if len(placed) < len(listed):
            raise ValueError("two tensors have one name")
        return GgufContents(self._path, self._total, settings, arrays, placed, header)

    def _take(self, nbytes: int) -> bytes:
        """Read the next bytes.

        Raises:
            ValueError: the file ends before.
            _UnreadError: they were not read.
        """
        end = self._place + nbytes
        if end > self._total:
            raise ValueError(f"ends before byte {end}")
        if end > len(self._data):
            raise _UnreadError
        taken = self._data[self._place : end]
        self._place = end
        return taken

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text(self) -> str:
        return self._bytes().decode()

    def _bytes(self) -> bytes:
        length = self._number("<Q")
        if length > self._total - self._place:
            raise ValueError(f"a text of {length} bytes at {self._place} goes beyond its end")
        return self._take(length)

    def _value(self, kind: int) -> Any:
        """Read a number or text; of an array, its place."""
        if kind == _STRING:
            return self._bytes().decode(errors="replace")
        if kind != _ARRAY:
            return self._number(self._layout(kind))
        of, count = self._number("<I"), self._number("<Q")
        if count > _MOST_VALUES:
            raise ValueError(f"an array of {count} values is longer than any vocabulary")
        array = GgufArray(of, count, self._place)
        if of != _STRING:
            self._take(struct.calcsize(self._layout(of)) * count)
            return array
        for _ in range(count):
            self._bytes()
        return array

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
