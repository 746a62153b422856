"""The beginning of a GGUF file: the header with all keys, and where each tensor begins."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from moemerge.checkpoint.pieces import Band, Piece
from moemerge.checkpoint.shards import Shard
from moemerge.export.tensors import GgufTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

ALIGNMENT_BYTES: Final = 32
"""Tensors begin at multiples of this, unless a file says otherwise."""


def add_tensor_infos(writer: "GGUFWriter", tensors: Sequence[GgufTensor]) -> None:
    """Add the tensors to a header, in the order of their bytes."""
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type.upper()]
        # With the stored type given, numpy's is not looked at; for bytes another shape would be expected.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)


def lay_out(writer: "GGUFWriter", tensors: Sequence[GgufTensor], file: Path) -> Shard:
    """Lay the file out as a shard; the header is written to `file`, and read back from there.

    Raises:
        OSError: the header cannot be written.
    """
    with closing(writer):
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    header = file.read_bytes()
    header += bytes(-len(header) % ALIGNMENT_BYTES)
    starts, end = {}, len(header)
    for tensor in tensors:
        starts[tensor.name] = end
        end += _padded(tensor.nbytes)
    return Shard(file.name, header, starts, end)


def padded_bands(tensors: Sequence[GgufTensor]) -> Mapping[str, tuple[Band, ...]]:
    """The bands that are written for each tensor, and zeros up to where the next one begins."""
    return {tensor.name: _with_padding(tensor) for tensor in tensors}


def _with_padding(tensor: GgufTensor) -> tuple[Band, ...]:
    room = _padded(tensor.nbytes) - tensor.nbytes
    if not room:
        return tensor.bands
    first = tensor.bands[0][0]
    return (*tensor.bands, (Piece(bytes(room), first.dtype),))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
