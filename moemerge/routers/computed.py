"""Routers, or a table of what they do, from one pass over the base model's layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import torch

from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import MergeConfig
from moemerge.errors import RouterError
from moemerge.families.dense import DenseModel
from moemerge.families.family import Scoring
from moemerge.families.mixture import Mixture
from moemerge.passes.device import find_device, memory_watched
from moemerge.routers.capture import capture_router_inputs
from moemerge.routers.delta import Labeller, delta_rows
from moemerge.routers.diagnostics import route_layer
from moemerge.routers.hidden import hidden_rows, shared_gate_row
from moemerge.routers.logistic import logistic_rows
from moemerge.routers.mergekit_hidden import mergekit_hidden_rows
from moemerge.routers.prompts import UNSORTED, encode_prompts
from moemerge.routers.report import LayerRouting
from moemerge.routers.request import LayerRows, RouterInputs, RouterRequest
from moemerge.routers.ridge import ridge_rows
from moemerge.routers.rows import Rows

METHODS: Final[dict[str, Callable[[RouterInputs, RouterRequest], LayerRows]]] = {
    "hidden": hidden_rows,
    "mergekit_hidden": mergekit_hidden_rows,
    "ridge": ridge_rows,
    "logistic": logistic_rows,
    "delta": delta_rows,
    "delta_bootstrap": ridge_rows,  # of documents that the weights have labelled
}


@memory_watched(
    "the base model read the prompts. Use fewer or shorter prompts, a smaller router.tokens_per_expert, or another "
    "--device; gate_mode random without prompts needs no pass."
)
def compute_routers(
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, TensorInfo], dtype: str, *,
    experts: Sequence[tuple[DenseModel, Mapping[str, TensorInfo]]], mixture: Mixture, scoring: Scoring,
    shared_gate: bool, made: Mapping[int, Rows] | None, seed: int, device: str,
    progress: Callable[[int, int], None], base_bits: Literal[4, 8] | None, low_memory: bool,
) -> tuple[dict[int, bytes], dict[int, bytes], list[LayerRouting]]:  # fmt: skip
    """By layer the rows (expert, hidden) and gates (1, hidden) as they are stored, and what the rows do with prompts.

    Rows that are already made are only routed by; None makes those of the config's method. See `init_routers`.
    """
    prompts = encode_prompts(folder, config, base.config["max_position_embeddings"], seed, shared_gate=shared_gate)
    request = RouterRequest(
        base, tensors, mixture, scoring, prompts, find_device(device), config.router, tuple(experts),
        entering=config.method.like_mergekit, base_bits=base_bits, low_memory=low_memory,
    )  # fmt: skip
    stored_dtype: torch.dtype = getattr(torch, dtype)
    layers, gates, routings = {}, {}, []
    last = mixture.moe_layers[-1] + 1
    passes, done = (2 if config.method.labels_texts else 1), 0
    if config.method.labels_texts:
        request, done = _label_documents(request, lambda layer: progress(layer, passes * last)), last
    for inputs in capture_router_inputs(request):
        new = (
            _rows(config.method.name, inputs, request)
            if made is None
            else LayerRows(torch.from_numpy(made[inputs.layer]))
        )
        rows = new.rows.to(stored_dtype)
        layers[inputs.layer] = _bytes(rows)
        if shared_gate:
            gates[inputs.layer] = _bytes(shared_gate_row(inputs).to(stored_dtype))
        if set(inputs.expert[inputs.routed].tolist()) == set(range(len(config.experts))):
            routings.append(route_layer(rows.float(), inputs, request, new.held_out))
        progress(done + inputs.layer + 1, passes * last)
    return layers, gates, routings


def _rows(method: str, inputs: RouterInputs, request: RouterRequest) -> LayerRows:
    try:
        return METHODS[method](inputs, request)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise RouterError(
            f"the router inputs of layer {inputs.layer} are too alike to be solved for with this router.lambda: "
            "raise it, leave it out, or give more text."
        ) from error


def _label_documents(request: RouterRequest, progress: Callable[[int], None]) -> RouterRequest:
    """The request with each unsorted document given to the expert whose weights respond to it most."""
    unsorted = tuple(prompt for prompt in request.prompts if prompt.expert == UNSORTED)
    labeller = Labeller(request)
    for inputs in capture_router_inputs(replace(request, prompts=unsorted)):
        labeller.read(inputs)
        progress(inputs.layer + 1)
    return replace(request, prompts=labeller.labelled(request.prompts))


def _bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data
