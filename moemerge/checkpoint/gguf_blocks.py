"""Tensors of a GGUF file: plain floats, or blocks of quantised numbers, which become float32 while they are read."""

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.codes import Codes
from moemerge.checkpoint.dequantised import Dequantised, Part
from moemerge.checkpoint.gguf_contents import GgufContents, GgufTensor
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import HeaderDType, bytes_of
from moemerge.errors import CheckpointError

_FLOATS: Final[dict[int, HeaderDType]] = {0: "F32", 1: "F16", 30: "BF16"}
# Name, numbers and bytes of a block, by ggml's number: what the package gguf dequantises.
_BLOCKS: Final[dict[int, tuple[str, int, int]]] = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True)
class BlockDecoder:
    """The package gguf's own dequantiser of one type of blocks."""

    kind: str
    """The type, as ggml names it."""

    def __call__(self, row: int, parts: list[Codes], values: NDArray[np.float32]) -> None:
        """Dequantise the rows of blocks."""
        del row
        from gguf import GGMLQuantizationType, dequantize

        values[...] = dequantize(parts[0], GGMLQuantizationType[self.kind])


def read_tensor(contents: GgufContents, tensor: GgufTensor) -> TensorInfo:
    """Find a tensor's bytes in a GGUF file, or how it is computed from them: from blocks, in float32.

    Raises:
        CheckpointError: it is of a type that cannot be read, or does not fit into the file.
    """
    where, shape = f"{contents.path}: tensor {tensor.name!r}", tensor.sizes[::-1]
    dtype = _FLOATS.get(tensor.type)
    if dtype is None and tensor.type not in _BLOCKS:
        known = ", ".join([*_FLOATS.values(), *(name for name, _, _ in _BLOCKS.values())])
        raise CheckpointError(f"{where}: is of ggml's type {tensor.type}, which is not read; known: {known}.")
    kind, numbers, block_bytes = (dtype, 1, bytes_of(dtype, (1,)) or 0) if dtype else _BLOCKS[tensor.type]
    *above, width = shape
    if width % numbers:
        raise CheckpointError(f"{where}: has rows of {width} numbers, and blocks of {kind} hold {numbers}.")
    if 0 in shape:
        raise CheckpointError(f"{where}: the shape {list(shape)} holds no numbers.")
    rows, row_bytes = math.prod(above), width // numbers * block_bytes
    end = tensor.offset + rows * row_bytes
    if end > contents.nbytes:
        raise CheckpointError(
            f"{where}: ends at byte {end}, but the file is {contents.nbytes} bytes long: it was cut off. Download it "
            "again."
        )
    if dtype:
        return TensorInfo(tensor.name, contents.path, dtype, shape, tensor.offset, rows * row_bytes)
    blocks = TensorInfo(tensor.name, contents.path, "U8", (rows, row_bytes), tensor.offset, rows * row_bytes)
    made = Dequantised(kind, (Part(blocks, span=width),), BlockDecoder(kind), (rows, width), "F32")
    return replace(made.tensor(tensor.name), shape=shape)
