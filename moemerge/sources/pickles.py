"""`pytorch_model*.bin`: where each tensor's bytes lie in the file, found without loading or executing anything."""

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


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch zip checkpoint as byte ranges of the file.

    `torch.load(mmap=True, weights_only=True)` under FakeTensorMode gives shapes and offsets and reads no tensor bytes:
    https://pytorch.org/docs/stable/notes/serialization.html

    Raises:
        CheckpointError: not a zip checkpoint, holds more than tensors, or a tensor that is not stored row by row.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

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
    return {name: _stored(path, name, tensor) for name, tensor in state.items()}


def _stored(path: Path, name: Any, tensor: Any) -> StoredTensor:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path}: expected a table of tensors, found {name!r:.60} -> {type(tensor).__name__}.")
    if not tensor.is_contiguous():
        raise CheckpointError(f"{path}: tensor {name!r} is not stored row by row. Convert the model to safetensors.")
    width = tensor.element_size()
    storage: Any = tensor.untyped_storage()
    start = storage._checkpoint_offset + int(tensor.storage_offset()) * width  # noqa: SLF001  torch's documented way
    dtype = _STORED.get(str(tensor.dtype), "U8")
    return StoredTensor(name, path, dtype, tuple(tensor.shape), start, tensor.numel() * width)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
