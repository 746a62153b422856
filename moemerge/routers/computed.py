"""Routers, or a table of what they do, from one pass over the base model's layers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from moemerge.checkpoint.header import StoredTensor
from moemerge.config import MergeConfig
from moemerge.errors import RouterError
from moemerge.formats.dense import DenseModel
from moemerge.routers.capture import capture_router_inputs
from moemerge.routers.diagnostics import route_layer
from moemerge.routers.hidden import hidden_rows
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.report import LayerRouting
from moemerge.routers.request import RouterInputs, RouterRequest
from moemerge.routers.rows import Rows


def compute_routers(
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, StoredTensor], dtype: str, *,
    made: Rows | None, device: str, progress: Callable[[int, int], None], base_bits: Literal[4, 8] | None,
    low_memory: bool,
) -> tuple[list[bytes], list[LayerRouting]]:  # fmt: skip
    """Of each layer the rows (expert, hidden) as they are stored, and what they do with the prompts: `init_routers`.

    Rows (layer, expert, hidden) that are already made are only routed by; None makes those of gate_mode hidden.
    """
    prompts = encode_prompts(folder, config.experts, base.config["max_position_embeddings"])
    request = RouterRequest(
        folder, base, tensors, tuple(config.experts), prompts, config.experts_per_token, find_device(device), base_bits,
        low_memory,
    )  # fmt: skip
    stored_dtype: torch.dtype = getattr(torch, dtype)
    layers, routings = [], []
    for layer, inputs in enumerate(_memory_watched(capture_router_inputs(request))):
        new = hidden_rows(inputs, request) if made is None else torch.from_numpy(made[layer])
        rows = new.to(stored_dtype)
        layers.append(rows.view(torch.uint8).numpy().tobytes())
        routings.append(route_layer(rows.float(), inputs, config.experts_per_token))
        progress(layer + 1, base.layers)
    return layers, routings


def _memory_watched(layers: Iterator[RouterInputs]) -> Iterator[RouterInputs]:
    """The same, with torch's ways of saying that memory ran out turned into one message."""
    try:
        yield from layers
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise RouterError(
            "memory ran out while the base model read the prompts. Use fewer or shorter prompts, or another --device; "
            "gate_mode random without prompts needs no pass."
        ) from error


def find_device(name: str) -> torch.device:
    """The device of this name, or the best that `auto` finds.

    Raises:
        RouterError: there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise RouterError(f"device {name!r} cannot be used here: {why}. Choose --device cpu.") from error
    return device
