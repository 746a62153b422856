"""Run a causal language model over windows of text, a layer at a time: its losses, and what its routers choose."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from moemerge.evaluation.choices import Choice
from moemerge.evaluation.head import Head
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.evaluation.text_pass import LoadedOnce, TextPass
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window

# Tokens whose logits are in memory at a time: 100 MB for a vocabulary of 50 000.
_TOKENS: Final = 512


def run_model(
    model: Runnable,
    windows: Sequence[Window],
    compute: Compute,
    *,
    mixture: MixtureModel | None = None,
    chosen: Callable[[Choice], None] = lambda _: None,
    predicted: Callable[[int, torch.Tensor], None] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    losses: bool = True,
) -> torch.Tensor:
    """Compute losses in nats, summed over each window's tokens that count: (window,).

    Args:
        model: the model to run.
        windows: the windows of text.
        compute: the devices and dtype to run in; whatever their number, `chosen` and `predicted` are called in one
            order.
        mixture: the mixture that `model` is, if `chosen` is wanted.
        chosen: called with the choices of each layer with a router, for each window.
        predicted: called with each window's number and its logits (token, vocab), float32 on the device.
        progress: called with the layers done and all there are.
        losses: whether losses are wanted; without them, the part after the last layer is run only to see that it gives
            finite numbers.

    Raises:
        CheckpointError: the tensors do not fit the class, or numbers are not finite; says where that began.
    """
    passing = TextPass(model, windows, compute, _TOKENS)
    for index, layers in passing.layers(progress):
        passing.run(index, layers, passing.router(mixture, index), chosen)
    head = Head(passing)
    if losses:
        return head.losses(predicted)
    head.check(_TOKENS)
    return torch.zeros(len(windows))


def run_together(
    models: Sequence[tuple[Runnable, Sequence[Window]]],
    compute: Compute,
    progress: Callable[[int, int], None],
    *,
    alike: bool = False,
) -> list[torch.Tensor]:
    """Compute losses as `run_model` does, of models of equal depth, each with windows of its own.

    All pass a layer before any passes the next one, so that what they share need be read only once. Those that are
    `alike` share most of it, and load it once, too.
    """
    passes = [TextPass(model, windows, compute, _TOKENS) for model, windows in models]
    loaded = LoadedOnce() if alike else None
    layers = models[0][0].layers
    for index in range(layers):
        for passing in passes:
            with passing.layer(index, loaded) as modules:
                passing.run(index, modules)
        if loaded:
            loaded.forget()
        progress(index + 1, layers)
    losses = []
    for passing in passes:
        head = Head(passing)
        losses.append(head.losses())
        head.drop()  # one head at a time
    return losses


def watch_layers(
    model: Runnable,
    windows: Sequence[Window],
    compute: Compute,
    watched: Callable[[int, Any], AbstractContextManager[None]],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Run a model's layers for what passes through their modules; what follows the last layer is not run.

    Args:
        model: the model to run.
        windows: the windows of text, which pass each by itself, without padding.
        compute: the device and dtype to run in; further devices do nothing.
        watched: called with each layer's number and module; the context that it returns is open while the windows pass
            through.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the tensors do not fit the class, or numbers are not finite; says where that began.
    """
    passing = TextPass(model, windows, compute.each[0], 0)
    for index, layers in passing.layers(progress):
        with watched(index, layers[0]):
            passing.run(index, layers)


def read_router_inputs(
    mixture: MixtureModel,
    windows: Sequence[Window],
    compute: Compute,
    entered: Callable[[int, torch.Tensor], None],
    *,
    rows: Callable[[int], torch.Tensor | None],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Run a mixture's layers for what enters its routers, whose rows may be made of that; the head is not run.

    Args:
        mixture: the mixture to run.
        windows: the windows of text.
        compute: the device and dtype to run in.
        entered: called in each layer with a router with the number of each window, and the states (token, hidden) in
            float32 that enter the router there.
        rows: called with the number of each layer with a router when all windows have come that far; the rows (expert,
            hidden) that it returns take the place of the router's before the windows pass through. None leaves it.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: the tensors do not fit the class, or numbers are not finite; says where that began.
    """
    passing = TextPass(mixture.runnable, windows, compute, _TOKENS)
    for index, layers in passing.layers(progress):
        if mixture.router(index) in mixture.runnable.shapes:
            passing.enter(mixture, index, layers, entered)
            made = rows(index)
            if made is not None:
                passing.replace(mixture.router(index), made)
        passing.run(index, layers)
