"""`pytorch_model*.bin`: where each tensor's bytes lie in the file, found without loading or executing anything."""

import math
import struct
import zipfile
import zlib
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.packed import Packed
from moemerge.checkpoint.unreadable import Unreadable
from moemerge.dtypes import BITS, HeaderDType, bytes_of
from moemerge.errors import CheckpointError
from moemerge.sources.pickle_objects import Opaque, StridedTensor
from moemerge.sources.unpickling import MAX_PICKLE_BYTES, unpickle

# Bytes of the archive's directory, which is read whole; for a model of 70 B parameters it has 0.05 MB.
_MAX_DIRECTORY_BYTES: Final = 4 * 2**20
_MAX_NAME: Final = 250
# Bytes of a record's own header; the directory repeats it, but for the lengths of its name and extra field.
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")
_ENCRYPTED: Final = 1


def read_pickle(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors of a PyTorch zip checkpoint as byte ranges of the file, or as tensors unpacked when read.

    Tensors that cannot be read are marked with the reason.
    https://docs.pytorch.org/docs/stable/notes/serialization.html

    Raises:
        CheckpointError: not a zip checkpoint, without a table of tensors, or without the records that the table names.
    """
    try:
        with _Bounded(path) as file:
            archive = _Archive(path, file)
            data = archive.read("data.pkl", MAX_PICKLE_BYTES)
            if archive.read("byteorder", _MAX_NAME, default=b"little") != b"little":
                raise CheckpointError(f"{path}: was written on a big-endian machine. Convert it to safetensors.")
            try:
                table = unpickle(data)
            except ValueError as error:
                raise CheckpointError(
                    f"{path}: cannot be read as weights only ({_first_line(error)}). "
                    "Convert it to safetensors with a program that you trust."
                ) from error
            if type(table) is not dict:
                raise CheckpointError(f"{path}: expected a table of tensors, found {_kind(table)}.")
            _check_table(path, table)
            return {name: _entry(archive, name, value) for name, value in table.items()}
    except (zipfile.BadZipFile, struct.error, OSError, RuntimeError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(
            f"{path}: is not a zip archive as PyTorch writes it since 1.6, or is cut off ({_first_line(error)}). "
            "Download it again, or convert it to safetensors with a program that you trust."
        ) from error


class _Archive:
    """The zip archive that `torch.save` writes: a folder with a pickle, and a record for each storage."""

    def __init__(self, path: Path, file: "_Bounded") -> None:
        self.path, self._file, self._zip = path, file, zipfile.ZipFile(file)
        self._file_bytes = path.stat().st_size
        records = {record.filename.lower(): record for record in self._zip.infolist()}  # torch looks for any case
        if len(records) < len(self._zip.infolist()):
            raise zipfile.BadZipFile("two records of one name")
        folder = next(iter(records), "").partition("/")[0] + "/"
        self._records = {name.removeprefix(folder): records[name] for name in records if name.startswith(folder)}

    def read(self, name: str, limit: int, default: bytes | None = None) -> bytes:
        """Read a small record."""
        record = self._records.get(name)
        if record is None and default is not None:
            return default
        if record is None:
            raise zipfile.BadZipFile(f"it has no {name}")
        if not _is_usual(record):
            raise zipfile.BadZipFile(f"its {name} is encrypted, or compressed in an unusual way")
        if record.file_size > limit:
            raise zipfile.BadZipFile(f"{name} is too long for a table of weights")
        with self._zip.open(record) as opened:
            return opened.read(limit)

    def find(self, key: str) -> tuple[zipfile.ZipInfo, int] | None:
        """Find the record of a storage, and where its bytes begin."""
        record = self._records.get(f"data/{key}".lower())
        if record is None:
            return None
        self._file.seek(record.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        start = record.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if magic != b"PK\3\4" or start + record.compress_size > self._file_bytes:
            raise zipfile.BadZipFile(f"the record of storage {key:.60} is not there")
        return record, start


class _Bounded(FileIO):
    """A file that is never read whole, whatever size an archive announces for its directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read the next bytes."""
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is too long for a file of weights")
        return super().read(-1 if size is None else size)


def _is_usual(record: zipfile.ZipInfo) -> bool:
    """Whether a record is stored plainly or compressed in the usual way."""
    if record.compress_type == zipfile.ZIP_STORED and record.compress_size != record.file_size:
        raise zipfile.BadZipFile("a record has two sizes")
    return record.compress_type in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} and not record.flag_bits & _ENCRYPTED


def _check_table(path: Path, table: dict[Any, Any]) -> None:
    for name, entry in table.items():
        if type(name) is not str or len(name) > _MAX_NAME:
            raise CheckpointError(f"{path}: expected names of tensors, found {name!r:.60} -> {_kind(entry)}.")
    tensors = [entry for entry in table.values() if isinstance(entry, StridedTensor | Opaque)]
    if table and not any(isinstance(entry, StridedTensor) or entry.is_tensor for entry in tensors):
        name, entry = next(iter(table.items()))
        inner = next((key for key, value in table.items() if type(value) is dict and value), None)
        hint = f" Save what is in its {inner!r} as a file of its own." if inner else ""
        raise CheckpointError(f"{path}: expected a table of tensors, found {name!r} -> {_kind(entry)}.{hint}")


def _entry(archive: _Archive, name: str, value: Any) -> TensorInfo:
    is_tensor = isinstance(value, StridedTensor) or (isinstance(value, Opaque) and value.is_tensor)
    if not isinstance(value, StridedTensor):
        reason = f"is {_kind(value)}" if is_tensor else f"is not a tensor but {_kind(value)}"
    elif (dtype := value.dtype) is None or (stored_dtype := value.storage.dtype) is None:
        reason = "holds numbers of a type that safetensors has no name for"
    elif value.conjugated:
        reason = "is complex and conjugated"
    else:
        return _stored(archive, name, value, dtype, value.storage.count * BITS[stored_dtype] // 8)
    return Unreadable(TensorInfo(name, archive.path, "U8", (), 0, 0), reason, is_tensor).tensor()


def _stored(archive: _Archive, name: str, tensor: StridedTensor, dtype: HeaderDType, limit: int) -> TensorInfo:
    """The bytes in an archive of a tensor whose storage has `limit` bytes."""
    stored = TensorInfo(name, archive.path, dtype, tensor.shape, 0, bytes_of(dtype, tensor.shape) or 0)
    if not stored.nbytes:
        return stored
    width, found = BITS[dtype] // 8, archive.find(tensor.storage.key)
    if not found or width * (_reach(tensor) + 1) > limit or limit > found[0].file_size:
        raise CheckpointError(f"{archive.path}: tensor {name!r} does not fit into its record. Download the file again.")
    record, start = found
    compressed = record.compress_type != zipfile.ZIP_STORED
    if not _is_usual(record):
        return Unreadable(stored, "is encrypted, or compressed in an unusual way").tensor()
    if not compressed and not tensor.negated and _is_row_by_row(tensor):
        return replace(stored, start=start + tensor.offset * width)
    stored = replace(stored, start=start, nbytes=record.compress_size)
    checksum = record.CRC if compressed else None
    return Packed(stored, tensor.offset, tensor.strides, tensor.negated, checksum, record.file_size).tensor()


def _reach(tensor: StridedTensor) -> int:
    """The position in the storage of the tensor's last number."""
    return tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))


def _is_row_by_row(tensor: StridedTensor) -> bool:
    return all(
        size == 1 or stride == math.prod(tensor.shape[axis + 1 :])
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.strides, strict=True))
    )


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, Opaque) else type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
