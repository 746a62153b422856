"""Linear layers with weights in 4 or 8 bits, computed by bitsandbytes: the only module that imports it."""

import logging
from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

# Inputs beyond this are multiplied in float16, as LLM.int8() does: https://arxiv.org/abs/2208.07339, section 3.2.
_OUTLIER: Final = 6.0
# On a CPU, bitsandbytes 0.50 gives wrong weights, or stops, where a row is no whole number of blocks of 64, or where
# the rows are no whole number of its tiles of 32. Models of any use have such sizes.
_BLOCK: Final = 64
_TILE: Final = 32


def quantise_weight(layer: torch.nn.Module, name: str, bits: Literal[4, 8]) -> None:
    """Quantise one weight that a layer has just been given; a parameter that is no Linear's weight stays as it is."""
    path, _, parameter = name.rpartition(".")
    linear = layer.get_submodule(path)
    if parameter == "weight" and isinstance(linear, torch.nn.Linear):
        quantised = _LINEARS[bits](linear)
        quantised.bias = linear.bias
        layer.set_submodule(path, quantised.eval())


def _in_8_bits(linear: torch.nn.Linear) -> Any:
    # Without this it warns at each product that the inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    quantised = Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=_OUTLIER, device="meta"
    )
    values, scales, _ = int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
    quantised.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    return quantised


def _in_4_bits(linear: torch.nn.Linear) -> Any:
    if linear.in_features % _BLOCK or linear.out_features % _TILE:
        return linear
    quantised = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta")
    weight = Params4bit(linear.weight, requires_grad=False, quant_type="nf4")
    quantised.weight = weight.to(linear.weight.device)  # quantises
    return quantised


_LINEARS: Final[dict[int, Callable[[torch.nn.Linear], Any]]] = {4: _in_4_bits, 8: _in_8_bits}
