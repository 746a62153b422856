"""Routers that need numbers from the base model: its embeddings, or one pass over its layers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import torch

from moemerge.checkpoint.header import StoredTensor
from moemerge.config import GateMode, MergeConfig
from moemerge.errors import RouterError
from moemerge.formats.dense import DenseModel
from moemerge.routers.cheap_embed import cheap_embed_router
from moemerge.routers.diagnostics import route_layer, row_distances
from moemerge.routers.hidden import hidden_router
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.random import DRAWN
from moemerge.routers.report import RoutingReport, expert_names
from moemerge.routers.request import LayerRouter, RouterInputs, RouterRequest

INITIALISERS: Final[dict[GateMode, Callable[[RouterRequest], LayerRouter]]] = {
    "hidden": hidden_router,
    "cheap_embed": cheap_embed_router,
    "random": lambda request: _drawn(request, "random"),
    "uniform_random": lambda request: _drawn(request, "uniform_random"),
}


def compute_routers(
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, StoredTensor], dtype: str, *,
    run_base: bool, seed: int, device: str, progress: Callable[[int, int], None],
    base_bits: Literal[4, 8] | None, low_memory: bool,
) -> tuple[list[bytes], RoutingReport]:  # fmt: skip
    """Of each layer the rows (expert, hidden) as they are stored, and what they do with the prompts: `init_routers`."""
    prompts = encode_prompts(folder, config.experts, base.config["max_position_embeddings"])
    request = RouterRequest(
        folder, base, tensors, tuple(config.experts), prompts, config.experts_per_token, seed, _device(device),
        base_bits, low_memory,
    )  # fmt: skip
    make_rows = INITIALISERS[config.gate_mode](request)
    stored_dtype: torch.dtype = getattr(torch, dtype)
    weights, routings = [], []
    if run_base:
        from moemerge.routers.capture import capture_router_inputs

        for layer, inputs in enumerate(_memory_watched(capture_router_inputs(request))):
            rows = make_rows(layer, inputs).to(stored_dtype)
            weights.append(rows)
            routings.append(route_layer(rows.float(), inputs, config.experts_per_token))
            progress(layer + 1, base.layers)
    else:
        weights = [make_rows(layer, None).to(stored_dtype) for layer in range(base.layers)]
    stacked = torch.stack(weights)
    if not bool(stacked.isfinite().all()):
        raise RouterError("some router weights are not finite numbers: the base model's activations overflow.")
    names = expert_names([expert.source_model for expert in config.experts])
    report = RoutingReport(names, config.experts_per_token, tuple(routings), row_distances(stacked.float()))
    return [rows.view(torch.uint8).numpy().tobytes() for rows in weights], report


def _drawn(request: RouterRequest, mode: GateMode) -> LayerRouter:
    shape = (request.base.layers, len(request.experts), request.base.config["hidden_size"])
    rows = torch.from_numpy(DRAWN[mode](shape, request.seed))
    return lambda layer, _inputs: rows[layer]


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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RouterError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
