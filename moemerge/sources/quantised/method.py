"""A method of quantisation: which tensors a quantised weight is stored as, and the matrix that they make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from moemerge.checkpoint.dequantised import Dequantised
from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES, HEADER_DTYPES, HeaderDType

Settings = Mapping[str, Any]
"""The `quantization_config` of a `config.json`."""
Parts = Mapping[str, TensorInfo]
"""The tensors that a module's weight is stored as, by the end of their names: `weight`, `weight_scale`."""
_SMALL_BYTES: Final = 2**18


class OddError(ValueError):
    """A weight cannot be dequantised; says why, as it follows the tensor's name in a message."""


@dataclass(frozen=True)
class Method:
    """A method of quantisation."""

    parts: frozenset[str]
    """The tensors that it stores beside other ones of a module, by the end of their names."""
    weight: Callable[[Settings, Parts, HeaderDType | None], Dequantised]
    """A function of the settings, the stored tensors and the model's own dtype; may raise `OddError`."""
    zero_biases: bool = False
    """Whether files store biases of zeros for layers that have none."""


def part_of(parts: Parts, *names: str) -> TensorInfo:
    """The first of the named tensors that a weight has.

    Raises:
        OddError: it has none of them.
    """
    for name in names:
        if name in parts:
            return parts[name]
    stored = parts.get("weight") or next(iter(parts.values()))
    raise OddError(f"is stored as {stored.dtype}, but has no {' or '.join(names)}")


def with_shape(tensor: TensorInfo, what: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor in an expected shape, from which it may differ by axes of one entry.

    Raises:
        OddError: it has another shape.
    """
    if [size for size in tensor.shape if size != 1] != [size for size in shape if size != 1]:
        raise OddError(f"has a {what} of shape {list(tensor.shape)}, and {list(shape)} is expected")
    return TensorInfo(tensor.name, tensor.path, tensor.dtype, shape, tensor.start, tensor.nbytes)


def with_dtype(tensor: TensorInfo, what: str, *dtypes: HeaderDType) -> TensorInfo:
    """The tensor, if it is stored in one of some dtypes.

    Raises:
        OddError: it is stored in another dtype.
    """
    if tensor.dtype not in dtypes:
        raise OddError(f"has a {what} stored as {tensor.dtype}, and {' or '.join(dtypes)} is expected")
    return tensor


def matrix(tensor: TensorInfo) -> tuple[int, int]:
    """The shape of a matrix.

    Raises:
        OddError: it is no matrix, or an empty one.
    """
    if len(tensor.shape) != 2 or not prod(tensor.shape):  # noqa: PLR2004
        raise OddError(f"is stored in the shape {list(tensor.shape)}, and a matrix is expected")
    return tensor.shape[0], tensor.shape[1]


def model_dtype(config: Mapping[str, Any]) -> HeaderDType | None:
    """The dtype that a `config.json` gives its model; None where it gives none that is merged."""
    named = config.get("dtype") or config.get("torch_dtype")
    return next((stored for name, stored in HEADER_DTYPES.items() if name == named), None)


def result_dtype(own: HeaderDType | None, computed_in: HeaderDType) -> HeaderDType:
    """The dtype of a dequantised weight: the model's own, else the one that it is computed in."""
    return own or (computed_in if computed_in in CONFIG_DTYPES else "BF16")


def content(tensor: TensorInfo) -> bytes:
    """Read the bytes of a small tensor.

    Raises:
        OddError: it is not small, or its file ends too early.
        CheckpointError: its file cannot be read.
        SourceError: it cannot be reached.
    """
    if tensor.nbytes > _SMALL_BYTES:
        raise OddError(
            f"has a {tensor.name.rpartition('.')[2]} of {tensor.nbytes} bytes, where some hundred are expected"
        )
    with tensor.open() as reader:
        return read_exactly(reader, tensor.nbytes)
