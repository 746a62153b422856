"""What one layer's router chooses while windows of text pass through the layer."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from moemerge.errors import CheckpointError
from moemerge.evaluation.runnable import MixtureModel
from moemerge.families.layer_names import layer_prefix
from moemerge.passes.decoder import Batch, run_layer
from moemerge.passes.finite import not_finite_in
from moemerge.passes.tokens import Window
from moemerge.routers.scoring import choose


@dataclass(frozen=True)
class Choice:
    """The choices of a layer's router for a window."""

    layer: int
    window: int
    experts: torch.Tensor
    """Chosen experts (token, choice), by falling weight; special tokens are included."""
    weights: torch.Tensor
    """Weights of the chosen experts (token, choice)."""
    logits: torch.Tensor
    """Router logits (token, expert), minus infinity for absent experts."""
    states: torch.Tensor
    """Router inputs (token, hidden)."""
    inputs: torch.Tensor
    """What enters the experts (token, hidden); not the router inputs where the router has factors on these."""


class _Reached(Exception):  # noqa: N818
    """The states have come to the router, and need go no further."""


def router_inputs(layer: Any, module: Any, batch: Batch, index: int) -> torch.Tensor:
    """Pass a batch through a layer as far as its router; returns what enters there (sequence, position, hidden).

    The batch stays as it is.
    """
    seen: list[torch.Tensor] = []

    def stop(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        with suppress(_Reached):
            run_layer(layer, batch, index)
    finally:
        handle.remove()
    return seen[0].reshape(*batch.states.shape[:2], -1).float().cpu()


class RouterWatcher:
    """A watcher of what one layer's router chooses."""

    def __init__(self, mixture: MixtureModel, modules: Sequence[Sequence[Any]], index: int, rows: torch.Tensor) -> None:
        """Watch a layer by its modules on each device: the router, and the experts where other states enter these."""
        self._mixture, self._modules, self._index, self._rows = mixture, modules, index, rows
        self._absent = mixture.absent(index)
        self._bias, self._factors = mixture.selection_bias(index), mixture.weight_factors(index)
        for name, values in (
            (mixture.router(index), mixture.runnable.read(mixture.router(index))),
            (layer_prefix(index) + mixture.family.selection_bias, self._bias),
            (layer_prefix(index) + mixture.family.weight_factors, self._factors),
        ):
            if values is not None and (broken := not_finite_in(name, values)):
                raise CheckpointError(f"{mixture.folder}: {broken}.")

    def watch(
        self, device: int, layer: Any, batch: Batch, part: Sequence[int], windows: Sequence[Window]
    ) -> list[Choice] | None:
        """Pass a batch through the layer on a device; returns the router's choices for each of the batch's windows.

        None where the router's logits are not finite, since they choose nothing then.
        """
        seen: list[torch.Tensor] = []
        handles = [
            module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
            for module in self._modules[device]
        ]
        try:
            run_layer(layer, batch, self._index)
        finally:
            for handle in handles:
                handle.remove()
        entered = [states.reshape(*batch.states.shape[:2], -1).float().cpu() for states in seen]
        choices = []
        for row, window in enumerate(part):
            states, *others = (each[row, : len(windows[window].ids)] for each in entered)
            logits = states @ self._rows.T
            if not logits.isfinite().all():
                return None
            logits[:, self._absent] = -torch.inf
            per_token, how = self._mixture.per_token(self._index), self._mixture.choosing
            weights, experts = choose(logits, per_token, how, self._bias, self._factors)
            choices.append(Choice(self._index, window, experts, weights, logits, states, *(others or [states])))
        return choices
