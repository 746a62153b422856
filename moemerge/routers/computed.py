"""Routers, or a table of what they do, from one pass over the base model's layers."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

from moemerge.checkpoint.header import StoredTensor
from moemerge.config import MergeConfig
from moemerge.errors import RouterError
from moemerge.formats import Mixture
from moemerge.formats.dense import DenseModel
from moemerge.formats.family import Scoring
from moemerge.routers.capture import capture_router_inputs
from moemerge.routers.diagnostics import route_layer
from moemerge.routers.hidden import hidden_rows, shared_gate_row
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.report import LayerRouting
from moemerge.routers.request import RouterInputs, RouterRequest
from moemerge.routers.rows import Rows


def compute_routers(
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, StoredTensor], dtype: str, *,
    mixture: Mixture, scoring: Scoring, shared_gate: bool, made: Mapping[int, Rows] | None, device: str,
    progress: Callable[[int, int], None], base_bits: Literal[4, 8] | None, low_memory: bool,
) -> tuple[dict[int, bytes], dict[int, bytes], list[LayerRouting]]:  # fmt: skip
    """By layer the rows (expert, hidden) and gates (1, hidden) as they are stored, and what the rows do with prompts.

    Rows that are already made are only routed by; None makes those of gate_mode hidden. See `init_routers`.
    """
    prompts = encode_prompts(
        folder, config.experts, base.config["max_position_embeddings"],
        shared=config.shared_experts if shared_gate else (),
    )  # fmt: skip
    request = RouterRequest(base, tensors, mixture, scoring, prompts, find_device(device), base_bits, low_memory)
    stored_dtype: torch.dtype = getattr(torch, dtype)
    layers, gates, routings = {}, {}, []
    for inputs in _memory_watched(capture_router_inputs(request)):
        new = hidden_rows(inputs, request) if made is None else torch.from_numpy(made[inputs.layer])
        rows = new.to(stored_dtype)
        layers[inputs.layer] = _bytes(rows)
        if shared_gate:
            gates[inputs.layer] = _bytes(shared_gate_row(inputs).to(stored_dtype))
        routings.append(route_layer(rows.float(), inputs, request))
        progress(inputs.layer + 1, mixture.moe_layers[-1] + 1)
    return layers, gates, routings


def _bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


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
