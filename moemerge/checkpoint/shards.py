"""Divide tensors into files: sizes as people write them, shard names, offsets, headers."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from moemerge.checkpoint.header import build_header
from moemerge.checkpoint.index import SINGLE_SAFETENSORS
from moemerge.dtypes import BITS, HeaderDType

# Units are decimal as on the Hub (5GB = 5e9 bytes), and binary only when written with an i.
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS: Final = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
METADATA: Final = {"format": "pt"}
"""Metadata that readers of safetensors files expect: the framework that can read them."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: HeaderDType
    """Dtype as a safetensors header spells it: `BF16`."""
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: the bytes of its header, and the offset in the file of each tensor."""

    name: str
    header: bytes
    starts: dict[str, int]
    """Map from tensor name to offset in the file, in the order of the bytes."""
    nbytes: int

    @property
    def tensor_bytes(self) -> int:
        """Size of its tensors in bytes, without the header."""
        return self.nbytes - len(self.header)


def parse_size(text: str) -> int:
    """Parse a size such as `5GB`, `500 MB`, `2GiB` or `1048576` into bytes; units are decimal unless written with an i.

    Raises:
        ValueError: not a size, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not match:
        raise ValueError(f"{text!r} is not a size: write it like 5GB, 500MB or 2GiB")
    size = int(Decimal(match[1]) * (_UNITS | _BINARY_UNITS)[match[2] or ""])
    if size == 0:
        raise ValueError(f"{text!r} is not a size: it has to be at least one byte")
    return size


def layout_shards(tensors: Sequence[TensorSpec], max_shard_bytes: int, last: Sequence[TensorSpec] = ()) -> list[Shard]:
    """Divide tensors, in order, into files of at most `max_shard_bytes` of tensor data.

    A tensor larger than that gets a file of its own. Within a file wider dtypes come first, so that every tensor
    stays aligned to its element size; otherwise the order is kept. The `last` tensors come after the others, and share
    no file with them.
    """
    groups = [*fill_shards(tensors, max_shard_bytes), *fill_shards(last, max_shard_bytes)]
    return build_shards([(0, group) for group in groups])


def build_shards(groups: Sequence[tuple[int, Sequence[TensorSpec]]]) -> list[Shard]:
    """Name the files and build headers; a group is the phase of its data in a block (0: any), and its tensors."""
    if len(groups) == 1:
        return [_shard(SINGLE_SAFETENSORS, *groups[0])]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", phase, group)
        for number, (phase, group) in enumerate(groups, start=1)
    ]


def fill_shards(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> Iterator[list[TensorSpec]]:
    """Divide tensors, in order, into groups of at most `max_shard_bytes`, or of one tensor."""
    group: list[TensorSpec] = []
    group_bytes = 0
    for tensor in tensors:
        if group and group_bytes + tensor.nbytes > max_shard_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(tensor)
        group_bytes += tensor.nbytes
    if group:
        yield group


def _shard(name: str, phase: int, tensors: Sequence[TensorSpec]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: -BITS[tensor.dtype])
    header = build_header(((t.name, t.dtype, t.shape, t.nbytes) for t in ordered), METADATA, phase)
    starts = {}
    end = len(header)
    for tensor in ordered:
        starts[tensor.name] = end
        end += tensor.nbytes
    return Shard(name, header, starts, end)
