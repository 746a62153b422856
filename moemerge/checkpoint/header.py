"""The safetensors header: read one without trusting it, and build one.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without holes:
https://github.com/huggingface/safetensors#format
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.files import File, Reader, open_range, read_exactly, size_of
from moemerge.checkpoint.json_text import MOST_BYTES, JsonTextError, parse_json
from moemerge.dtypes import BITS, HeaderDType, bytes_of
from moemerge.errors import CheckpointError

LENGTH_BYTES: Final = 8
ALIGNMENT_BYTES: Final = 8
BLOCK_BYTES: Final = 4096
"""Block size of file systems that can share a block between files, in bytes."""
MAX_AXES: Final = 16  # a shape of many huge sizes would take minutes to multiply
_METADATA_KEY: Final = "__metadata__"
_HALF: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: `nbytes` bytes from offset `start` of the file `path`."""

    name: str
    path: File
    dtype: HeaderDType
    """Dtype as a safetensors header spells it: `BF16`."""
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def open(self) -> Reader:
        """Open the tensor at its first byte; the reader may go on past its last.

        Raises:
            CheckpointError: its file cannot be read.
            SourceError: its file cannot be reached.
        """
        try:
            return open_range(self.path, self.start, self.nbytes)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}. Was it moved meanwhile?") from error

    def keep(self, folder: Path) -> None:
        """Keep the tensor's bytes in `folder` when they are first read, if its file is on another machine."""
        if not isinstance(self.path, Path):
            self.path.keep(folder, self.start, self.nbytes)

    def rows(self, first: int, count: int) -> "TensorInfo":
        """A slice along the first axis: `count` entries from `first` on; its bytes are a part of this tensor's.

        Raises:
            ValueError: there are no such entries, or they do not begin and end with whole bytes.
        """
        if not self.shape or min(first, count) < 0 or first + count > self.shape[0]:
            raise ValueError(
                f"{self.name}: no {count} rows from row {first} on in a tensor of shape {list(self.shape)}"
            )
        skipped = bytes_of(self.dtype, (first, *self.shape[1:]))
        nbytes = bytes_of(self.dtype, (count, *self.shape[1:]))
        if skipped is None or nbytes is None:
            raise ValueError(f"{self.name}: {count} rows from row {first} on are not whole bytes of {self.dtype}")
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + skipped, nbytes=nbytes)


def read_header(path: File) -> dict[str, TensorInfo]:
    """Read and check a safetensors header; tensor bytes are not touched.

    Raises:
        CheckpointError: names the file, the tensor, what was expected and what was found.
    """
    text, file_bytes = _read_text(path)
    entries, _ = _parse(path, text)
    data_start = LENGTH_BYTES + len(text)
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    _check_coverage(path, tensors, data_start, file_bytes)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: File) -> dict[str, str]:
    """Read the metadata of a safetensors header.

    Raises:
        CheckpointError: see `read_header`.
    """
    return _parse(path, _read_text(path)[0])[1]


def _read_text(path: File) -> tuple[bytes, int]:
    """Read the header's JSON, and the size of the file."""
    try:
        file_bytes = size_of(path)
        with open_range(path, 0, min(LENGTH_BYTES, file_bytes)) as reader:
            prefix = read_exactly(reader, min(LENGTH_BYTES, file_bytes))
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < LENGTH_BYTES or header_bytes > file_bytes - LENGTH_BYTES:
            raise CheckpointError(
                f"{path}: not a safetensors file, or cut off: it announces a header of {header_bytes} bytes "
                f"but is {file_bytes} bytes long. Download it again."
            )
        if header_bytes > MOST_BYTES:
            raise CheckpointError(f"{path}: its header has {header_bytes} bytes; at most {MOST_BYTES} are read.")
        with open_range(path, LENGTH_BYTES, header_bytes) as reader:
            return read_exactly(reader, header_bytes), file_bytes
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str], phase: int = 0
) -> bytes:
    """Build the length prefix and header for tensors given as (name, dtype, shape, nbytes) in the order of their bytes.

    The header is padded with spaces so that the data begin at a multiple of 8 bytes; with a `phase`, so far into a
    block.
    """
    header: dict[str, Any] = {_METADATA_KEY: dict(metadata)}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    unit = BLOCK_BYTES if phase else ALIGNMENT_BYTES
    text += b" " * ((phase - LENGTH_BYTES - len(text)) % unit)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _parse(path: File, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse the header's entries and metadata; whatever the reference reader refuses is refused."""

    def refuse(name: str) -> None:
        raise CheckpointError(f"{path}: the header names {name!r} twice.")

    try:
        header = parse_json(text, refuse)
    except JsonTextError as error:
        raise CheckpointError(f"{path}: the safetensors header {error}. Download it again.") from error
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object.")
    metadata = header.pop(_METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {_METADATA_KEY} in the header has to be a table of texts.")
    if name := next((name for name in (*header, *metadata, *metadata.values()) if _HALF.search(name)), None):
        raise CheckpointError(f"{path}: the header holds half of a letter, a lone surrogate, in {name!r:.80}.")
    return header, metadata


def _is_size_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _tensor(path: File, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets in the header, found {entry!r:.80}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r:.80}; known: {', '.join(BITS)}.")
    if not _is_size_list(shape):
        raise CheckpointError(f"{where}: the shape has to be a list of sizes, found {shape!r:.80}.")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004
        raise CheckpointError(f"{where}: data_offsets have to be [begin, end], found {offsets!r:.80}.")
    begin, end = offsets
    expected = bytes_of(dtype, tuple(shape))
    if expected != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {expected} bytes, but its data_offsets span {end - begin}."
        )
    return TensorInfo(name, path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_coverage(path: File, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """Refuse overlaps and holes, which the format forbids: each tensor begins where the one before it ends."""
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        where = f"{path}: tensor {tensor.name!r}"
        if tensor.start < end:
            raise CheckpointError(f"{where}: overlaps the tensor before it by {end - tensor.start} bytes.")
        if tensor.start > end:
            raise CheckpointError(f"{where}: {tensor.start - end} bytes before it belong to no tensor.")
        end = tensor.start + tensor.nbytes
        if end > file_bytes:
            raise CheckpointError(
                f"{where}: ends at byte {end}, but the file is {file_bytes} bytes long: it was cut off."
            )
    if end < file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - end} bytes after the last tensor belong to no tensor.")
