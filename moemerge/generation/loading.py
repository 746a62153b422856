"""A whole causal language model in memory, of transformers' own class."""

from collections.abc import Callable
from math import prod
from typing import Any

from moemerge.checkpoint.disk import shown_bytes
from moemerge.errors import RefusedError
from moemerge.evaluation.runnable import Runnable
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.decoder import empty_model
from moemerge.passes.device import free_memory, memory_watched
from moemerge.passes.loading import cast, check_complete, complete_head, load_tensors


def check_memory(model: Runnable, compute: Compute, free: int | None) -> None:
    """Refuse a model that does not fit into `free` bytes of memory; None where that is not known.

    Raises:
        RefusedError: says how much it needs, and what to do.
    """
    layers = [sum(prod(model.shapes[name]) for name in model.names(layer)) for layer in (None, *range(model.layers))]
    # A layer that is read lies beside what it is made of.
    numbers = sum(layers) + max(layers)
    need = numbers * compute.dtype.itemsize
    if free is None or need <= free:
        return
    narrow = 2 * numbers
    steps = "Use another device, or write it smaller for llama.cpp: `moemerge gguf --type q4_k_m`"
    if compute.dtype_name == "float32" and narrow <= free:
        steps = f"In bfloat16 it needs {shown_bytes(narrow)}: --compute-dtype bfloat16"
    raise RefusedError(
        f"{model.name}: needs {shown_bytes(need)} of memory in {compute.dtype_name}, {shown_bytes(free)} are free on "
        f"{compute.device.type}. {steps}."
    )


def load_model(model: Runnable, compute: Compute, progress: Callable[[int, int], None]) -> Any:
    """Load a whole model, whose weights are not trained.

    Args:
        model: the model to load.
        compute: the device and dtype of its weights.
        progress: called with the layers loaded and all there are.

    Raises:
        RefusedError: it does not fit into memory.
        CheckpointError: its tensors do not fit the class.
        RouterError: memory ran out.
    """
    check_memory(model, compute, free_memory(compute.device))
    with memory_watched(f"{model.name} was loaded. Use another device or a smaller model."):
        whole = empty_model(model.model_type, model.keys, compute.device, head=True, dtype=compute.dtype)
        for layer in (None, *range(model.layers)):
            tensors = {name: cast(model.read(name), compute.dtype) for name in model.names(layer)}
            load_tensors(whole, tensors, compute.device)
            progress(0 if layer is None else layer + 1, model.layers)
    complete_head(whole)
    check_complete(whole.model, "model")
    return whole.requires_grad_(requires_grad=False)
