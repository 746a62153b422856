"""Descriptions of the objects in a PyTorch pickle: what torch's functions would make, without making it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from moemerge.checkpoint.header import MAX_AXES
from moemerge.dtypes import HeaderDType

# Number types by the names of their storages and their own names, as a safetensors header spells them.
_STORAGES: Final[dict[str, HeaderDType]] = {
    "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64", "Byte": "U8", "Char": "I8", "Short": "I16",
    "Int": "I32", "Long": "I64", "Bool": "BOOL", "ComplexFloat": "C64", "Untyped": "U8",
}  # fmt: skip
_DTYPES: Final[dict[str, HeaderDType]] = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "uint8": "U8", "int8": "I8",
    "bool": "BOOL", "int16": "I16", "int32": "I32", "int64": "I64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a class, a function or a dtype; it is never imported."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers in a record of the archive."""

    key: str
    """The record's key."""
    dtype: HeaderDType | None
    """Dtype as a safetensors header spells it; None where it has no name for it."""
    count: int


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A view into a storage, in numbers of `dtype`, from the number `offset` on."""

    storage: Storage
    dtype: HeaderDType | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: bool
    """Whether the stored numbers count with the opposite sign."""
    conjugated: bool


@dataclass(frozen=True, slots=True)
class Opaque:
    """An object that is none of the above."""

    kind: str
    """The kind of object, in words for messages: `a sparse tensor`."""
    is_tensor: bool


def _tensor(*arguments: Any) -> StridedTensor:
    """Describe a tensor by storage, offset, shape, strides, requires_grad, hooks, bits; the last three are optional."""
    storage, offset, shape, strides, *rest = arguments
    return _view(storage, storage.dtype, (offset, shape, strides), rest[2] if rest[2:] else None)


def _typed_tensor(*arguments: Any) -> StridedTensor:
    """Describe a tensor as `_tensor` does, from arguments with the name of a dtype before the bits."""
    storage, offset, shape, strides, _trained, _hooks, dtype, *rest = arguments
    return _view(storage, _dtype(dtype), (offset, shape, strides), rest[0] if rest else None)


def _view(storage: Any, dtype: HeaderDType | None, place: tuple[Any, Any, Any], bits: Any) -> StridedTensor:
    offset, shape, strides = place
    if not (isinstance(storage, Storage) and isinstance(bits, dict | None) and type(shape) is type(strides) is tuple):
        raise TypeError
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    if not all(type(size) is int and 0 <= size < 2**63 for size in (storage.count, offset, *shape, *strides)):
        raise ValueError("a size that is not one")
    negated, conjugated = ((bits or {}).get(bit, False) is True for bit in ("neg", "conj"))
    return StridedTensor(storage, dtype, offset, shape, strides, negated, conjugated)


def storage_dtype(name: Name) -> HeaderDType | None:
    """The dtype of a class of storages, as a safetensors header spells it; None where it has no name for it."""
    return _STORAGES.get(name.text.rpartition(".")[2].removesuffix("Storage"))


def _dtype(name: Any) -> HeaderDType | None:
    if not isinstance(name, Name):
        raise TypeError
    return _DTYPES.get(name.text.removeprefix("torch."))


def _same(data: Any, *_: Any) -> StridedTensor | Opaque:
    """Describe a parameter as its tensor."""
    if not isinstance(data, StridedTensor | Opaque):
        raise TypeError
    return data


def _from_device(data: Any, dtype: Any, *_: Any) -> StridedTensor | Opaque:
    """Describe a tensor of a TPU, which is stored as it would be on a CPU."""
    if isinstance(data, StridedTensor) and data.dtype == _dtype(dtype):
        return data
    return Opaque("a tensor of another type than its numbers", is_tensor=True)


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if type(sizes) is not tuple:
        raise TypeError
    return sizes


def _ordered(*items: Any) -> dict[Any, Any] | Opaque:
    return Opaque("OrderedDict", is_tensor=False) if items else {}


def _unlike(kind: str) -> Callable[..., Opaque]:
    return lambda *_: Opaque(kind, is_tensor=True)


MADE: Final[dict[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch.nn.parameter.Parameter": _same,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_device,
    "torch._utils._rebuild_meta_tensor_no_storage": _unlike("a meta tensor, without numbers"),
    "torch._utils._rebuild_sparse_tensor": _unlike("a sparse tensor"),
    "torch._utils._rebuild_qtensor": _unlike("a quantised tensor"),
    "torch._utils._rebuild_nested_tensor": _unlike("a nested tensor"),
    "torch._utils._rebuild_wrapper_subclass": _unlike("a tensor of a class of its own"),
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
}
"""Functions that describe what torch's functions and classes would make, by their names."""
