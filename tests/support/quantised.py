"""Tiny models quantised by the libraries whose files are read, and the weights that these libraries make of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moemerge.dtypes import CONFIG_DTYPES
from moemerge.passes.weights import read_into
from moemerge.sources.model_folder import open_model
from moemerge.sources.tensor_tables import read_tensor_tables
from tests.support.models import edit_json, load_weights, save_weights

Weights = dict[str, torch.Tensor]
Quantiser = Callable[[Weights], tuple[Weights, dict[str, Any], Weights]]
"""Of a model's projections: what is stored, the `quantization_config`, and what the library makes of it."""


def quantise(folder: Path, kind: str) -> Weights:
    """Quantise a model in place; returns its weights as the library reads them again."""
    weights = load_weights(folder)
    chosen = {name: tensor for name, tensor in weights.items() if "proj" in name}
    stored, settings, read = KINDS[kind](chosen)
    rest = {name: tensor for name, tensor in weights.items() if name not in chosen}
    save_weights(folder, rest | stored)
    edit_json(folder / "config.json", quantization_config=settings)
    return rest | read


def weights_of(folder: Path | str) -> Weights:
    """A model's weights as they are read here."""
    (table,) = read_tensor_tables([open_model(str(folder), print)], print, dense=True)
    found = {}
    for name, tensor in table.items():
        found[name] = torch.empty(tensor.shape, dtype=getattr(torch, CONFIG_DTYPES[tensor.dtype]))
        read_into(tensor, found[name])
    return found


def differing(found: Weights, expected: Weights) -> list[str]:
    """Names of tensors of which dtype, shape or any bit differs, or which one side lacks."""

    def same(name: str) -> bool:
        one, other = found.get(name), expected.get(name)
        if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))

    return [name for name in sorted(found.keys() | expected.keys()) if not same(name)]


def dequantised_copy(folder: Path, weights: Weights) -> None:
    """Give a quantised model plain weights."""
    save_weights(folder, weights)
    edit_json(folder / "config.json", quantization_config=None)


def _fp8(block: list[int] | None, scale_fmt: str = "float") -> Quantiser:
    def run(weights: Weights) -> tuple[Weights, dict[str, Any], Weights]:
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        if not hasattr(fp8, "Fp8Dequantize"):
            pytest.skip("this transformers does not dequantise FP8")
        from transformers import FineGrainedFP8Config

        settings = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
        quantiser = SimpleNamespace(quantization_config=settings)
        stored: Weights = {}
        for name, weight in weights.items():
            stored |= fp8.Fp8Quantize(quantiser).convert({name: weight})
        read = {}
        for name, weight in weights.items():
            parts = {end: stored[f"{name}{end.removeprefix('weight')}"] for end in ("weight", "weight_scale_inv")}
            made = fp8.Fp8Dequantize(quantiser)._dequantize_one(*parts.values(), output_dtype=weight.dtype)
            read[name] = made
        scales = {name: scale.reshape(()) if scale.numel() == 1 else scale for name, scale in stored.items()}
        return scales, settings.to_dict(), read

    return run


def _compressed(format_: str, stored_scales: torch.dtype | None = torch.bfloat16, **weights: Any) -> Quantiser:
    def run(chosen: Weights) -> tuple[Weights, dict[str, Any], Weights]:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_)
        compressor = BaseCompressor.get_value_from_registry(format_)
        stored: Weights = {}
        read: Weights = {}
        for name, weight in chosen.items():
            module = name.removesuffix(".weight")
            parts = compressor.compress({"weight": weight, **_parameters(weight, args, stored_scales)}, scheme)
            stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            read[name] = compressor.decompress(parts, scheme)["weight"].to(weight.dtype)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=format_, quantization_status="compressed", ignore=["lm_head"]
        )
        return stored, config.model_dump(mode="json") | {"quant_method": "compressed-tensors"}, read

    return run


def _bitsandbytes(quant_type: str, dtype: torch.dtype | None = None, **settings: Any) -> Quantiser:
    def run(chosen: Weights) -> tuple[Weights, dict[str, Any], Weights]:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Params4bit

        stored: Weights = {}
        read: Weights = {}
        for name, weight in chosen.items():
            made = Params4bit(weight.to(dtype or weight.dtype), quant_type=quant_type, **settings).to("cpu")
            stored[name] = made.data
            stored |= {f"{name}.{part}": tensor for part, tensor in made.quant_state.as_dict(packed=True).items()}
            # bitsandbytes 0.50.2 is wrong on a CPU where blocks end inside a row: a row is a block here.
            made.quant_state.shape = torch.Size(
                [weight.numel() // made.quant_state.blocksize, made.quant_state.blocksize]
            )
            read[name] = dequantize_4bit(made.data, made.quant_state).reshape(weight.shape)
        return stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}, read

    return run


def _bitsandbytes_8bit(chosen: Weights) -> tuple[Weights, dict[str, Any], Weights]:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    stored: Weights = {}
    read: Weights = {}
    for name, weight in chosen.items():
        codes, scales, _ = int8_vectorwise_quant(weight.half())
        module = name.removesuffix("weight")
        stored |= {name: codes, f"{module}SCB": scales, f"{module}weight_format": torch.zeros((), dtype=torch.uint8)}
        read[name] = int8_vectorwise_dequant(codes, scales).to(weight.dtype)
    return stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, read


def _packed(numbers: torch.Tensor, bits: int, axis: int, places: list[int] | None = None) -> torch.Tensor:
    """Pack whole numbers along an axis in words of 32 bits; place p of a word has number `places[p]` of its numbers."""
    in_word = 32 // bits
    rows = numbers.movedim(axis, -1).long().reshape(*numbers.movedim(axis, -1).shape[:-1], -1, in_word)
    shifted = torch.zeros(rows.shape[:-1], dtype=torch.int64)
    for place, number in enumerate(places or range(in_word)):
        shifted += rows[..., number] << bits * place
    words = torch.where(shifted >= 2**31, shifted - 2**32, shifted).to(torch.int32)
    return words.movedim(-1, axis).contiguous()


def _columns(bits: int, group: int, *, awq: bool = False, in_order: bool = True, v2: bool = False) -> Quantiser:
    """GPTQ and AWQ by the definition of their formats; `test_quantised.py` asks the libraries, where they are."""

    def run(chosen: Weights) -> tuple[Weights, dict[str, Any], Weights]:
        generator = torch.Generator().manual_seed(0)
        stored: Weights = {}
        read: Weights = {}
        for name, weight in chosen.items():
            rows, width = weight.shape
            groups = torch.arange(width) // group
            groups = groups if in_order else groups[torch.randperm(width, generator=generator)]
            numbers = torch.randint(0, 2**bits, (width, rows), generator=generator)
            zeros = torch.randint(1, 2**bits, (width // group, rows), generator=generator)
            scales = (torch.rand(zeros.shape, generator=generator) / 2**bits).half()
            read[name] = ((numbers - zeros[groups]) * scales[groups]).T.to(weight.dtype)
            places = [0, 2, 4, 6, 1, 3, 5, 7] if awq else None
            parts = {
                "qweight": _packed(numbers, bits, 1 if awq else 0, places),
                "qzeros": _packed(zeros if awq or v2 else zeros - 1, bits, 1, places),
                "scales": scales,
                **({} if awq else {"g_idx": groups.int()}),
            }
            stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
        settings = {"bits": bits, "group_size": group}
        if awq:
            return stored, settings | {"quant_method": "awq", "version": "gemm", "zero_point": True}, read
        return stored, settings | {"quant_method": "gptq", **({"checkpoint_format": "gptq_v2"} if v2 else {})}, read

    return run


def _parameters(weight: torch.Tensor, args: Any, stored_scales: torch.dtype | None) -> Weights:
    """Scales and zero points of a weight, by the library's own rule for the least and the largest number of a block."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    rows, width = weight.shape
    group = (1, args.group_size or width)
    blocks = {"tensor": (rows, width), "channel": (1, width), "block": args.block_structure}
    high, wide = blocks.get(args.strategy, group)
    parts = [
        [weight[row : row + high, column : column + wide].float() for column in range(0, width, wide)]
        for row in range(0, rows, high)
    ]
    least, largest = (torch.tensor([[getattr(part, of)() for part in line] for line in parts]) for of in ("min", "max"))
    divisor = generate_gparam(least.min(), largest.max()).reshape(1) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(least, largest, args, **({} if divisor is None else {"global_scale": divisor}))
    found = {"weight_scale": scale.to(stored_scales) if stored_scales else scale, "weight_zero_point": zero}
    if args.strategy == "tensor":
        found = {name: tensor.reshape(1) for name, tensor in found.items()}
    return found if divisor is None else found | {"weight_global_scale": divisor}


FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float"}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int"}
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
MX: dict[str, Any] = {
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": torch.uint8,
    "zp_dtype": torch.uint8,
}
NV: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}
KINDS: Mapping[str, Quantiser] = {
    "FP8, blocks": _fp8([16, 8]),
    "FP8, blocks with exponents": _fp8([8, 16], "ue8m0"),
    "FP8, whole matrices": _fp8(None),
    "compressed FP8, rows": _compressed("float-quantized", strategy="channel", **FLOAT8),
    "compressed FP8, matrices in float16": _compressed("float-quantized", torch.float16, strategy="tensor", **FLOAT8),
    "compressed FP8, blocks": _compressed(
        "float-quantized", torch.float32, strategy="block", block_structure=[28, 10], **FLOAT8
    ),
    "compressed int8, rows": _compressed("int-quantized", strategy="channel", **INT8),
    "compressed int8, zero points": _compressed("int-quantized", strategy="channel", symmetric=False, **INT8),
    "compressed int4, groups": _compressed("pack-quantized", **INT4),
    "compressed int4, zero points": _compressed("pack-quantized", symmetric=False, **INT4),
    "packed int8": _compressed("pack-quantized", strategy="channel", symmetric=False, **INT8),
    "compressed MXFP8": _compressed("mxfp8-quantized", None, num_bits=8, **MX),
    "compressed MXFP4": _compressed("mxfp4-pack-quantized", None, num_bits=4, **MX),
    "compressed NVFP4": _compressed("nvfp4-pack-quantized", None, **NV),
    "bitsandbytes, 8 bits": _bitsandbytes_8bit,
    "bitsandbytes, NF4": _bitsandbytes("nf4", blocksize=64, compress_statistics=False),
    "bitsandbytes, NF4 with nested scales": _bitsandbytes("nf4", blocksize=64),
    "bitsandbytes, NF4 of float16 in words": _bitsandbytes("nf4", torch.float16, quant_storage=torch.float32),
    "bitsandbytes, FP4 in long blocks": _bitsandbytes("fp4", blocksize=256),
    "GPTQ": _columns(4, 32),
    "GPTQ, ordered by activations": _columns(4, 16, in_order=False),
    "GPTQ, 8 bits, second format": _columns(8, 32, v2=True),
    "AWQ": _columns(4, 32, awq=True),
}


def loaded_by_transformers(folder: Path) -> Weights:
    """The weights of a quantised model as `from_pretrained` dequantises them, on a machine without a GPU."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").state_dict())
