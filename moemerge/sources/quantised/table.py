"""The table of a quantised model's tensors as that of the plain matrices that its own library makes of them."""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.jobs import CONNECTIONS
from moemerge.checkpoint.unreadable import Unreadable
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.sources.quantised.bitsandbytes import BITSANDBYTES
from moemerge.sources.quantised.columns import AWQ, GPTQ
from moemerge.sources.quantised.compressed_tensors import COMPRESSED_TENSORS
from moemerge.sources.quantised.fp8 import FP8
from moemerge.sources.quantised.method import Method, OddError, Parts, Settings, content, model_dtype

METHODS: Final[Mapping[str, Method]] = {
    "fp8": FP8,
    "compressed-tensors": COMPRESSED_TENSORS,
    "bitsandbytes": BITSANDBYTES,
    "gptq": GPTQ,
    "awq": AWQ,
}
"""The methods that are read, by the name that `quantization_config` gives them as `quant_method`."""

_FP8: Final = "F8_E4M3"
_NO_SETTINGS: Final = (
    "is FP8 with scales, but config.json has no quantization_config, which says what shares a scale: copy it from the "
    "model's original config.json"
)


def dequantised(config: Mapping[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Replace quantised weights, and all that is stored beside them, by matrices that are computed while they are read.

    Weights that are stored as plain numbers stay, whatever the config says of them. Those that cannot be dequantised
    are marked as unreadable, with the reason. Models of other methods stay as they are.

    Args:
        config: the model's `config.json`.
        tensors: its tensors by name.
    """
    settings = _settings(config)
    method = METHODS.get(settings["quant_method"])
    if method is None:
        return tensors if settings["quant_method"] else _without_settings(tensors)
    modules = _modules(method, tensors)
    own = model_dtype(config)

    def made(module: str) -> dict[str, TensorInfo]:
        name, parts = f"{module}.weight", modules[module]
        bias = tensors.get(f"{module}.bias") if method.zero_biases else None
        try:
            left_out = {f"{module}.bias": _zero_bias(bias)} if bias and not any(content(bias)) else {}
            return {name: method.weight(settings, parts, own).tensor(name), **left_out}
        except OddError as error:
            stored = parts.get("weight") or next(iter(parts.values()))
            return {name: Unreadable(stored, str(error)).tensor(replace(stored, name=name))}

    gone = {tensor.name for parts in modules.values() for tensor in parts.values()}
    table = {name: tensor for name, tensor in tensors.items() if tensor.name not in gone}
    with ThreadPoolExecutor(CONNECTIONS) as pool:  # some methods store facts in small tensors, each a request to a Hub
        for found in pool.map(made, modules):
            table |= found
    return table


def _without_settings(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Mark weights in FP8 with scales as unreadable, in a model whose `config.json` does not say how they belong."""
    if not any(tensor.dtype == _FP8 for tensor in tensors.values()):
        return tensors
    scaled = [parts for parts in _modules(FP8, tensors).values() if len(parts) > 1 and "weight" in parts]
    gone = {tensor.name for parts in scaled for tensor in parts.values()}
    left = {name: tensor for name, tensor in tensors.items() if tensor.name not in gone}
    return left | {parts["weight"].name: Unreadable(parts["weight"], _NO_SETTINGS).tensor() for parts in scaled}


def _zero_bias(bias: TensorInfo) -> TensorInfo:
    reason = "holds zeros alone, which GPTQ stores where a layer has no bias"
    return Unreadable(bias, reason, is_tensor=False).tensor()


def unread_method(config: Mapping[str, Any]) -> str:
    """The method of quantisation that a `config.json` names, if it is none of those that are read; else empty."""
    method: str = _settings(config)["quant_method"]
    return "" if method in METHODS else method


def plain_model(
    config: Mapping[str, Any], tensors: dict[str, TensorInfo]
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A model's `config.json` and tensors as if it had never been quantised; both as they are for other methods."""
    if _settings(config)["quant_method"] not in METHODS:
        return dict(config), tensors
    return {key: value for key, value in config.items() if key != "quantization_config"}, dequantised(config, tensors)


def _settings(config: Mapping[str, Any]) -> Settings:
    """The settings with the name of their method, which old ones of bitsandbytes lack; it is empty for none."""
    given = config.get("quantization_config")
    settings = given if isinstance(given, dict) else {}
    old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return {**settings, "quant_method": str(settings.get("quant_method") or ("bitsandbytes" if old else ""))}


def _modules(method: Method, tensors: Mapping[str, TensorInfo]) -> dict[str, Parts]:
    """The parts of each quantised weight by the name of its module."""
    ends = sorted(map(re.escape, method.parts), key=len, reverse=True)
    pattern = re.compile(rf"(.+?)\.({'|'.join(ends)})")
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = tensor
    return {
        module: parts
        for module, parts in modules.items()
        if len(parts) > 1 or next(iter(parts.values())).dtype not in CONFIG_DTYPES
    }
