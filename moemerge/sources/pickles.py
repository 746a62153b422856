"""`pytorch_model*.bin`: where each tensor's bytes lie in the file, found without loading or executing anything."""

import struct
import zipfile
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import StoredTensor
from moemerge.errors import CheckpointError

_STORED: Final = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float64": "F64",
}

# Of a zip archive's local file header, the lengths of name and extra field; the rest stands in the directory too.
_LOCAL_HEADER: Final = struct.Struct("<26xHH")


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch zip checkpoint as byte ranges of the file.

    `torch.load(mmap=True, weights_only=True)` under FakeTensorMode gives shapes and offsets and reads no tensor bytes:
    https://pytorch.org/docs/stable/notes/serialization.html

    Raises:
        CheckpointError: not a zip checkpoint, holds more than tensors, or a tensor that is not stored row by row.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    records = _read_records(path)
    try:
        with FakeTensorMode():
            state: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or hostile pickle provokes
        raise CheckpointError(
            f"{path}: cannot be read as weights only ({_first_line(error)}). "
            "Convert it to safetensors with a program that you trust."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a table of tensors, found {type(state).__name__}.")
    return {name: _stored(path, name, tensor, records) for name, tensor in state.items()}


def _read_records(path: Path) -> dict[int, int]:
    """Offset and size of the zip archive's records, checked to be plain little-endian bytes."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: is compressed. Convert it to safetensors.")
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    raise CheckpointError(f"{path}: was written on a big-endian machine. Convert it to safetensors.")
                file.seek(record.header_offset)
                local = file.read(_LOCAL_HEADER.size)
                name_bytes, extra_bytes = _LOCAL_HEADER.unpack(local)
                records[record.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes] = record.file_size
    except (zipfile.BadZipFile, struct.error, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is no PyTorch zip archive, or is cut off ({_first_line(error)}). "
            "Download it again, or convert it to safetensors with a program that you trust."
        ) from error
    return records


def _stored(path: Path, name: Any, tensor: Any, records: dict[int, int]) -> StoredTensor:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path}: expected a table of tensors, found {name!r:.60} -> {type(tensor).__name__}.")
    if not tensor.is_contiguous():
        raise CheckpointError(f"{path}: tensor {name!r} is not stored row by row. Convert the model to safetensors.")
    width = tensor.element_size()
    storage: Any = tensor.untyped_storage()
    record = storage._checkpoint_offset  # noqa: SLF001  torch's documented way
    start = record + int(tensor.storage_offset()) * width
    if start + tensor.numel() * width > record + records.get(record, 0):
        raise CheckpointError(f"{path}: tensor {name!r} does not fit into its record. Download the file again.")
    dtype = _STORED.get(str(tensor.dtype), "U8")
    return StoredTensor(name, path, dtype, tuple(tensor.shape), start, tensor.numel() * width)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
