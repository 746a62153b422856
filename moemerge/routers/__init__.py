"""How routers get their first weights: one file per way, one pass over the base model for all that need it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from moemerge.checkpoint.header import StoredTensor
from moemerge.config import GateMode, MergeConfig
from moemerge.errors import RouterError
from moemerge.formats.dense import DenseModel
from moemerge.routers.cheap_embed import cheap_embed_router
from moemerge.routers.diagnostics import RoutingReport, expert_names, route_layer, row_distances
from moemerge.routers.hidden import hidden_router
from moemerge.routers.random import random_router, uniform_random_router
from moemerge.routers.request import EncodedPrompt, LayerRouter, RouterInputs, RouterRequest

__all__ = ["INITIALISERS", "Routers", "init_routers"]

INITIALISERS: Final[dict[GateMode, Callable[[RouterRequest], LayerRouter]]] = {
    "hidden": hidden_router,
    "cheap_embed": cheap_embed_router,
    "random": random_router,
    "uniform_random": uniform_random_router,
}


@dataclass(frozen=True)
class Routers:
    """Router weights (layer, expert, hidden) in the output's dtype, and what they do."""

    weights: torch.Tensor
    report: RoutingReport

    def layer_bytes(self, layer: int) -> bytes:
        """One layer's rows as they are stored."""
        return self.weights[layer].contiguous().view(torch.uint8).numpy().tobytes()


def init_routers(
    config: MergeConfig, folder: Path, base: DenseModel, tensors: dict[str, StoredTensor], dtype: str, *,
    run_base: bool, seed: int, device: str, progress: Callable[[int, int], None],
    base_bits: Literal[4, 8] | None = None, low_memory: bool = False,
) -> Routers:  # fmt: skip
    """Compute the routers of a merge and the table of what they do with its prompts.

    Args:
        config: the merge.
        folder: the base model's folder.
        base: the base model's config.
        tensors: the base model's tensors.
        dtype: of the merged model; routers are judged as they will be stored.
        run_base: whether the base model reads the prompts, for the routers or for the table.
        seed: of the random ways.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`.
        low_memory: whether not to read ahead.
        progress: called with the number of layers done and the number of all.
        base_bits: of the base model's Linear weights while it reads the prompts; needs bitsandbytes.

    Raises:
        RouterError: the tokenizer, the prompts or the device do not serve.
    """
    prompts: tuple[EncodedPrompt, ...] = ()
    if run_base or config.reads_prompts:
        # These import transformers, which routers without prompts do not need.
        from moemerge.routers.prompts import encode_prompts

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
    return Routers(stacked, report)


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
