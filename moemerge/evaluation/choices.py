"""What one layer's router chooses while windows of text pass through the layer."""

from collections.abc import Callable, Sequence
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


class RouterWatcher:
    """A watcher of one layer's router: what enters it, and what it chooses."""

    def __init__(  # noqa: PLR0917
        self,
        mixture: MixtureModel,
        layer: Any,
        module: Any,
        index: int,
        rows: torch.Tensor,
        entered: Callable[[int, int, torch.Tensor], None],
    ) -> None:
        self._mixture, self._layer, self._module, self._index, self._rows = mixture, layer, module, index, rows
        self._entered = entered
        self._absent = mixture.absent(index)
        self._bias, self._factors = mixture.selection_bias(index), mixture.weight_factors(index)
        for name, values in (
            (mixture.router(index), mixture.runnable.read(mixture.router(index))),
            (layer_prefix(index) + mixture.family.selection_bias, self._bias),
            (layer_prefix(index) + mixture.family.weight_factors, self._factors),
        ):
            if values is not None and (broken := not_finite_in(name, values)):
                raise CheckpointError(f"{mixture.folder}: {broken}.")

    def watch(self, batch: Batch, part: Sequence[int], windows: Sequence[Window]) -> list[Choice] | None:
        """Pass a batch through the layer; returns the router's choices for each of the batch's windows.

        None where the router's logits are not finite, since they choose nothing then.
        """
        seen: list[torch.Tensor] = []
        handle = self._module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            run_layer(self._layer, batch, self._index)
        finally:
            handle.remove()
        states = seen[0].reshape(*batch.ids.shape, -1).float().cpu()
        choices = []
        for row, window in enumerate(part):
            inputs = states[row, : len(windows[window].ids)]
            logits = inputs @ self._rows.T
            if not logits.isfinite().all():
                return None
            self._entered(self._index, window, inputs)
            logits[:, self._absent] = -torch.inf
            per_token, how = self._mixture.per_token(self._index), self._mixture.choosing
            weights, experts = choose(logits, per_token, how, self._bias, self._factors)
            choices.append(Choice(self._index, window, experts, weights, logits, inputs))
        return choices
