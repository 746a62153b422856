"""The formats of the compressed-tensors package, which llm-compressor writes: FP8, integers of 8 and 4 bits, FP4.

The numbers are those that `BaseCompressor.decompress` makes, computed in the dtype of the scales, then rounded to the
model's own: https://github.com/vllm-project/compressed-tensors
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moemerge.checkpoint.codes import Alphabet
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

_FLOATS: Final[tuple[HeaderDType, ...]] = ("F32", "BF16", "F16")
_WORD_BITS: Final = 32
_PLAIN: Final = ("float-quantized", "int-quantized", "naive-quantized")
_FP4: Final = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_FORMATS: Final = (*_PLAIN, "mxfp8-quantized", "pack-quantized", *_FP4)
_ALPHABETS: Final[Mapping[tuple[str, int], Alphabet]] = {
    ("float", 8): "F8_E4M3", ("int", 8): "I8", ("packed", 8): "8 bits", ("packed", 4): "4 bits", ("float", 4): "FP4",
}  # fmt: skip
_KINDS: Final[Mapping[Alphabet, str]] = {
    "F8_E4M3": "FP8", "I8": "8-bit integers", "8 bits": "8-bit integers", "4 bits": "4-bit integers", "FP4": "FP4",
}  # fmt: skip


@dataclass(frozen=True)
class _Scheme:
    """What the settings say of quantised weights."""

    form: str
    alphabet: Alphabet
    weights: Mapping[str, Any]

    def block(self, shape: tuple[int, int]) -> Block:
        """The block that shares a scale in a matrix."""
        group, strategy = self.weights.get("group_size"), self.weights.get("strategy")
        if strategy is None:
            strategy = "tensor" if group is None else "channel" if group == -1 else "group"
        size: Any = {
            "tensor": shape,
            "channel": (1, shape[1]),
            "group": (1, group),
            "tensor_group": (1, group),
            "block": self.weights.get("block_structure"),
        }.get(str(strategy).lower())
        sizes = tuple(size) if isinstance(size, list | tuple) else ()
        if len(sizes) != 2 or not all(type(one) is int and one > 0 for one in sizes):  # noqa: PLR2004
            raise OddError(
                f"is quantised with the strategy {strategy!r:.40} of blocks of {size!r:.40}, which is not read"
            )
        return sizes[0], sizes[1]


def _weight(settings: Settings, parts: Parts, own: HeaderDType | None) -> Dequantised:
    scheme = _scheme(settings)
    if "weight_g_idx" in parts:
        raise OddError("has groups of columns out of order (weight_g_idx), which compressed-tensors no longer reads")
    packed = scheme.form not in (*_PLAIN, "mxfp8-quantized")
    codes = part_of(parts, "weight_packed" if packed else "weight")
    stored: HeaderDType = {"F8_E4M3": "F8_E4M3", "I8": "I8", "FP4": "U8"}.get(scheme.alphabet, "I32")  # type: ignore[assignment]
    codes = with_dtype(codes, "weight_packed" if packed else "weight", stored)
    shape = _shape(codes, scheme, packed=packed)
    block = scheme.block(shape)
    scale = with_shape(part_of(parts, "weight_scale"), "weight_scale", grid_of(shape, block))
    span = block[0] * shape[1]
    read = [Part(codes, shape[1]), Part(scale, span)]
    scales, computed_in = _scales(scheme, scale)
    zeros: HeaderDType | None = None
    if scheme.weights.get("symmetric", True) is False:
        zero = part_of(parts, "weight_zero_point")
        read.append(_zeros(zero, scheme, grid_of(shape, block), span, packed=packed))
        zeros = zero.dtype
    divided = scheme.form == "nvfp4-pack-quantized" and "weight_global_scale" in parts
    if divided:
        divisor = with_dtype(parts["weight_global_scale"], "weight_global_scale", "F32")
        read.append(Part(with_shape(divisor, "weight_global_scale", ())))
    return Dequantised(
        f"{_KINDS[scheme.alphabet]} with a scale per {in_words(shape, block)} ({scheme.form})",
        tuple(read),
        Scaled(block, scheme.alphabet, scales, zeros, divided=divided),
        shape,
        result_dtype(own, computed_in),
        computed_in,
    )


def _scheme(settings: Settings) -> _Scheme:
    """Read the settings of weights, which have to be the same for all.

    Raises:
        OddError: they differ, or are not among those that are read.
    """
    groups = settings.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    found = [(group.get("format") or settings.get("format"), group.get("weights")) for group in groups]
    if not found or any(one != found[0] for one in found[1:]):
        raise OddError("is quantised, and the config_groups in config.json do not say how, the same for all weights")
    form, weights = found[0]
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in {None, "dense"}:
        form = f"{form}, {sparse['format']}"
    if settings.get("transform_config"):
        form = f"{form} after a rotation (transform_config)"
    weights = weights if isinstance(weights, dict) else {}
    kind = "packed" if form == "pack-quantized" else str(weights.get("type", "int")).lower()
    bits = weights.get("num_bits", 8)
    alphabet = _ALPHABETS.get((kind, bits)) if type(bits) is int else None
    if form not in _FORMATS or alphabet is None or (form in _FP4) != (alphabet == "FP4"):
        raise OddError(
            f"is quantised as {form!s:.60} with {bits!r:.10} bits of {kind:.10}, and of the formats of "
            f"compressed-tensors {', '.join(_FORMATS)} with 8 or 4 bits alone are read"
        )
    return _Scheme(str(form), alphabet, weights)


def _shape(codes: TensorInfo, scheme: _Scheme, *, packed: bool) -> tuple[int, int]:
    rows, stored = matrix(codes)
    if not packed:
        return rows, stored
    return rows, stored * 2 if scheme.alphabet == "FP4" else stored * _WORD_BITS // scheme.weights.get("num_bits", 8)


def _scales(scheme: _Scheme, scale: TensorInfo) -> tuple[HeaderDType, HeaderDType]:
    """What the scales are stored as, and the dtype that numbers are computed in."""
    if scheme.form.startswith("mxfp"):
        with_dtype(scale, "weight_scale", "U8")
        return "F8_E8M0", "BF16"
    if scheme.form == "nvfp4-pack-quantized":
        with_dtype(scale, "weight_scale", "F8_E4M3")
        return "F8_E4M3", "BF16"
    with_dtype(scale, "weight_scale", *_FLOATS)
    return scale.dtype, scale.dtype


def _zeros(zero: TensorInfo, scheme: _Scheme, grid: tuple[int, int], span: int, *, packed: bool) -> Part:
    if not packed:
        return Part(with_shape(with_dtype(zero, "weight_zero_point", "I8"), "weight_zero_point", grid), span)
    in_word = _WORD_BITS // scheme.weights["num_bits"]
    words = with_shape(
        with_dtype(zero, "weight_zero_point", "I32"), "weight_zero_point", (-(-grid[0] // in_word), grid[1])
    )
    return Part(words, span * in_word)


_STORED: Final = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")
_BESIDE: Final = (
    "weight_shape", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
COMPRESSED_TENSORS: Final = Method(frozenset({*_STORED, *_BESIDE}), _weight)
"""The method that `config.json` calls `compressed-tensors`."""
