"""A whole model in memory, as gradients need it, and whether there is room for it."""

from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.checkpoint import checkpoint

from moemerge.errors import RefusedError
from moemerge.evaluation.runnable import Runnable
from moemerge.evaluation.running import check_complete
from moemerge.passes.decoder import empty_model
from moemerge.passes.loading import load_tensors

# Tokens that pass at once: two of the longest windows and what a tokenizer puts in front.
TOKENS_AT_ONCE: Final = 1040
# Logits, their softmax and its gradient.
_LOGIT_COPIES: Final = 3


def load_whole(
    runnable: Runnable, device: torch.device, dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    first: Callable[[Any, int], None] = lambda _model, _layer: None,
) -> Any:  # fmt: skip
    """A whole model in memory, frozen, its layers recomputed where gradients are asked for.

    Args:
        runnable: what to load.
        device: where.
        dtype: of its weights.
        progress: called with the layers done and all there are.
        first: called with the model and a layer before that layer's tensors are loaded.

    Raises:
        CheckpointError: the tensors do not fit the class.
    """
    model = empty_model(runnable.model_type, runnable.keys, device, head=True)
    for layer in [None, *range(runnable.layers)]:
        if layer is not None:
            first(model, layer)
        load_tensors(model, {name: runnable.read(name).to(dtype) for name in runnable.names(layer)}, device)
        progress((layer or 0) + 1, runnable.layers)
    head = model.get_output_embeddings()
    if head.weight.is_meta:
        head.weight = model.model.embed_tokens.weight
    check_complete(model.model, "model")
    model.requires_grad_(requires_grad=False)
    if device.type == "cpu" and hasattr(model, "set_experts_implementation"):
        # In transformers 5. Grouped products take 1.5 times as long there, backwards, in bfloat16.
        model.set_experts_implementation("eager")
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def check_memory(runnable: Runnable, device: torch.device, dtype: torch.dtype, tokens: int, copies: int) -> str:
    """What the model needs in memory, in words.

    Args:
        runnable: the model.
        device: where it is held.
        dtype: of its weights.
        tokens: that pass at once.
        copies: how many processes of this machine hold one in the same memory.

    Raises:
        RefusedError: it does not fit.
    """
    parameters = sum(map(prod, runnable.shapes.values()))
    states = tokens * (runnable.layers + 8) * int(runnable.keys["hidden_size"])
    logits = _LOGIT_COPIES * tokens * int(runnable.keys["vocab_size"])
    need = copies * (parameters * dtype.itemsize + 4 * (states + logits))
    free = _free(device)
    what = (
        f"{parameters / 1e6:,.0f} M parameters in {str(dtype).removeprefix('torch.')}: about {need / 1e9:.1f} GB of "
        "memory"
    )
    if free is not None and need > free:
        raise RefusedError(
            f"{runnable.name}: tuning holds the whole model in memory, {what}, but {free / 1e9:.1f} GB are free on "
            f"{device.type}. Use another machine or device, or make routers without it: `gate_mode: ridge`."
        )
    return what + ("" if free is None else f", of {free / 1e9:.1f} GB that are free")


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
