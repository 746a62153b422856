"""Load a whole model for training: into memory, or a layer at a time from the disk where memory is short."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Final

import torch
from torch.utils.checkpoint import checkpoint

from moemerge.errors import RefusedError
from moemerge.evaluation.runnable import Runnable
from moemerge.passes.decoder import empty_model
from moemerge.passes.loading import cast, check_complete, complete_head, load_tensors

# Copies of the logits: themselves, their softmax and its gradient.
_LOGIT_COPIES: Final = 3
# A layer that is read lies beside what it is made of (stacked experts beside single ones), and beside the one before.
_LAYER_COPIES: Final = 3
# The values that a layer computes for a token, and their gradients, in widths of the states between layers.
_ACTIVATIONS: Final = 64
# Bytes of Python, torch and transformers themselves, and of fragmented memory.
_LIBRARIES: Final = 1_000_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """The place of a model's layers while it is tuned, and the memory that it takes."""

    streamed: bool
    """Whether layers are read from the disk each time that they are passed, and not held in memory."""
    needs: str = ""
    """How much memory the model takes, in words."""

    @property
    def tokens_at_once(self) -> int:
        """Tokens that pass at once: 2 or 8 of the longest windows, and what a tokenizer puts in front."""
        return 4160 if self.streamed else 1040


def load_whole(  # noqa: PLR0917
    runnable: Runnable,
    device: torch.device,
    dtype: torch.dtype,
    memory: MemoryPlan,
    trained: Mapping[str, torch.nn.Parameter],
    progress: Callable[[int, int], None],
) -> tuple[Any, dict[str, torch.nn.Module]]:
    """Load a whole model, frozen, whose layers are recomputed where gradients are needed.

    Args:
        runnable: the model to load.
        device: the device to load it to.
        dtype: the dtype of its weights.
        memory: whether its layers are held in memory.
        trained: parameters that are put into the model, by the name of the tensor that they replace.
        progress: called with the layers read and all there are.

    Returns:
        The model, and the module that holds each of them, by name.

    Raises:
        CheckpointError: the tensors do not fit the class; in a streamed model also when it is run.
    """
    model = empty_model(runnable.model_type, runnable.keys, device, head=True, dtype=dtype)
    holders = {name: _place(model, name, parameter) for name, parameter in trained.items()}
    load = _part_loader(runnable, model, device=device, dtype=dtype, trained=trained, progress=progress)
    load(None)
    complete_head(model)
    if device.type == "cpu" and hasattr(model, "set_experts_implementation"):
        # This exists in transformers 5. Its grouped products take 1.5 times as long in bfloat16 on the way back.
        model.set_experts_implementation("eager")
    for number, layer in enumerate(model.model.layers):
        forward = layer.forward
        if memory.streamed:
            forward = partial(from_disk, partial(load, number), layer, forward)
        else:
            load(number)
        layer.forward = partial(checkpoint, forward, use_reentrant=False)
    return model, holders


def _part_loader(
    runnable: Runnable,
    model: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trained: Mapping[str, torch.nn.Parameter],
    progress: Callable[[int, int], None],
) -> Callable[[int | None], None]:
    """Make a function that loads a layer by number, or for None what is outside all, frozen unless it is trained."""

    def load(layer: int | None) -> None:
        names = [name for name in runnable.names(layer) if name not in trained]
        load_tensors(model, {name: cast(runnable.read(name), dtype) for name in names}, device)
        parts = model.model.named_children() if layer is None else [(f"layers.{layer}", model.model.layers[layer])]
        for path, part in parts:
            if path != "layers":
                check_complete(part, f"model.{path}")
            for parameter in part.parameters():
                parameter.requires_grad_(any(parameter is one for one in trained.values()))
        progress((layer or 0) + 1, runnable.layers)

    return load


def _place(model: Any, name: str, trained: torch.nn.Parameter) -> torch.nn.Module:
    """Put a parameter where its tensor belongs: where a new one has values after the tensor is loaded alone."""
    given = [parameter for parameter in model.parameters() if not parameter.is_meta]
    load_tensors(model, {name: trained.detach()}, trained.device)
    module, own = next(
        (module, own)
        for module in model.modules()
        for own, parameter in module.named_parameters(recurse=False)
        if not parameter.is_meta and not any(parameter is other for other in given)
    )
    setattr(module, own, trained)
    holder: torch.nn.Module = module
    return holder


def from_disk(
    load: Callable[[], None], module: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run a module's forward with its weights in memory meanwhile; autograd holds what gradients need of them."""
    load()
    try:
        return forward(*args, **kwargs)
    finally:  # a recomputation ends by an exception
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    empty = torch.empty_like(parameter, device="meta")
                    setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))


def plan_memory(
    runnable: Runnable, device: torch.device, dtype: torch.dtype, free: int | None, processes: int
) -> MemoryPlan:
    """Decide whether a model fits into memory, or its layers have to be read from the disk.

    Args:
        runnable: the model.
        device: the device that it is held on.
        dtype: the dtype of its weights.
        free: free bytes of memory; None where that is not known.
        processes: how many processes share this memory, each with a model of its own.

    Raises:
        RefusedError: not even a layer at a time fits.
    """
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in runnable.shapes.items()}
    whole = sum(sizes.values())
    layers = [sum(sizes[name] for name in runnable.names(layer)) for layer in range(runnable.layers)]
    parameters = f"{whole / dtype.itemsize / 1e6:,.0f} M parameters in {str(dtype).removeprefix('torch.')}"

    def needed(memory: MemoryPlan, weights: int) -> int:
        states = (runnable.layers + _ACTIVATIONS) * int(runnable.keys["hidden_size"])
        logits = _LOGIT_COPIES * int(runnable.keys["vocab_size"])
        return processes * (_LIBRARIES + weights + 4 * memory.tokens_at_once * (states + logits))

    held = needed(MemoryPlan(streamed=False), whole + max(layers))
    if free is None or held <= free:
        known = "" if free is None else f", of {free / 1e9:.1f} GB that are free"
        return MemoryPlan(streamed=False, needs=f"{parameters}: about {held / 1e9:.1f} GB of memory{known}")
    read = sum(layers)
    need = needed(MemoryPlan(streamed=True), whole - read + _LAYER_COPIES * max(layers))
    if need > free:
        raise RefusedError(
            f"{runnable.name}: tuning a layer of the model at a time needs about {need / 1e9:.1f} GB of memory, but "
            f"{free / 1e9:.1f} GB are free on {device.type}. Use another machine or device, or make routers without "
            "it: `gate_mode: ridge`."
        )
    return MemoryPlan(
        streamed=True,
        needs=f"{parameters} would take about {held / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: its "
        f"layers, {read / 1e9:.1f} GB, are read twice in each step, and about {need / 1e9:.1f} GB of memory taken",
    )
