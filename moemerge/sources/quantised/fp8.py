"""FP8 as DeepSeek and Qwen release it: a scale for each block; also one for each matrix or row.

The numbers are those of transformers' `FineGrainedFP8Config(dequantize=True)`: times the scale in float32, rounded to
the model's dtype. Where a size is no multiple of the block's, the blocks at the border are smaller, as in DeepSeek's
own `inference/fp8_cast_bf16.py`.
"""

from typing import Final

from moemerge.checkpoint.dequantised import Dequantised, Part
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import HeaderDType
from moemerge.sources.quantised.method import (
    Method,
    OddError,
    Parts,
    Settings,
    matrix,
    part_of,
    result_dtype,
    with_dtype,
    with_shape,
)
from moemerge.sources.quantised.scaled import Block, Scaled, grid_of, in_words

_BLOCK: Final = [128, 128]
_SCALES: Final = ("weight_scale_inv", "weight_scale")


def _weight(settings: Settings, parts: Parts, own: HeaderDType | None) -> Dequantised:
    codes = with_dtype(part_of(parts, "weight"), "weight", "F8_E4M3")
    scale = part_of(parts, *_SCALES)
    name = next(name for name in _SCALES if name in parts)
    scale = with_dtype(scale, name, "F32", "BF16", "F16", "F8_E8M0", "U8")
    shape = matrix(codes)
    block = _block(settings, scale, shape)
    scale = with_shape(scale, name, grid_of(shape, block))
    # transformers takes bytes for exponents of two, as MX formats store them.
    stored: HeaderDType = "F8_E8M0" if scale.dtype == "U8" else scale.dtype
    return Dequantised(
        f"FP8 with a scale per {in_words(shape, block)}",
        (Part(codes, shape[1]), Part(scale, block[0] * shape[1])),
        Scaled(block, "F8_E4M3", stored),
        shape,
        result_dtype(own, stored),
    )


def _block(settings: Settings, scale: TensorInfo, shape: tuple[int, int]) -> Block:
    """The block that shares a scale, by the shape of the scales, and by the settings if there is one for each block."""
    sizes = [size for size in scale.shape if size != 1]
    if not sizes:
        return shape
    if sizes == [shape[0]] and scale.name.endswith(_SCALES[1]):
        return 1, shape[1]
    given = settings.get("weight_block_size", _BLOCK)
    is_block = isinstance(given, list) and len(given) == len(_BLOCK)
    if not is_block or not all(type(size) is int and size > 0 for size in given):
        raise OddError(
            f"has scales for blocks, but the weight_block_size in config.json is {given!r:.40}; two sizes are "
            "expected, such as [128, 128]"
        )
    return given[0], given[1]


FP8: Final = Method(frozenset({"weight", *_SCALES, "input_scale", "activation_scale"}), _weight)
"""The method that `config.json` calls `fp8`."""
