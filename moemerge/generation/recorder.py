"""The routers of a mixture that is loaded as a whole: what they choose for each token that it reads."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from moemerge.errors import CheckpointError
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.finite import not_finite_in
from moemerge.passes.loading import path_in_memory
from moemerge.routers.scoring import choose, widened


class RouterRecorder:
    """The routers of a loaded mixture; they keep what entered them for the last token of each pass."""

    def __init__(self, mixture: MixtureModel, model: Any) -> None:
        """Begin to watch.

        Raises:
            CheckpointError: numbers of a router are not finite.
        """
        self.mixture, self.layers = mixture, tuple(mixture.moe_layers)
        self._passes: list[deque[torch.Tensor]] = []  # (layer, pass), each (hidden)
        absent = torch.zeros(len(self.layers), len(mixture.experts), dtype=torch.bool)
        rows = []
        self._given: list[list[torch.Tensor | None]] = []  # each layer's selection bias and factors on weights
        for index, layer in enumerate(self.layers):
            path = path_in_memory(model, mixture.router(layer))
            rows.append(model.get_parameter(path).detach().float())
            if broken := not_finite_in(mixture.router(layer), rows[-1]):
                raise CheckpointError(f"{mixture.folder}: {broken}.")
            absent[index, mixture.absent(layer)] = True
            given = (mixture.selection_bias(layer), mixture.weight_factors(layer))
            self._given.append([None if values is None else values.to(model.device) for values in given])
            self._passes.append(deque())
            model.get_submodule(path.rpartition(".")[0]).register_forward_pre_hook(_keeper(self._passes[-1]))
        self._rows = torch.stack(rows)  # (layer, expert, hidden)
        self._absent = absent.to(model.device)  # (layer, expert)

    def clear(self) -> None:
        """Forget all passes."""
        for passes in self._passes:
            passes.clear()

    def skip(self) -> None:
        """Forget the oldest pass, that of the prompt."""
        for passes in self._passes:
            passes.popleft()

    @property
    def has_pass(self) -> bool:
        """Whether there is a whole pass."""
        return bool(self._passes[-1])

    def choices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the oldest pass: the experts and weights (layer, choice) of its last token."""
        states = torch.stack([passes.popleft() for passes in self._passes]).float()
        logits = torch.einsum("lh,leh->le", states, self._rows).masked_fill(self._absent, -torch.inf)
        found = []
        for index, layer in enumerate(self.layers):
            how, given = self.mixture.choosing, self._given[index]
            chosen = choose(logits[index : index + 1], self.mixture.per_token(layer), how, *given)
            found.append(widened(*chosen, self.mixture.experts_per_token))
        weights, experts = (torch.cat(parts) for parts in zip(*found, strict=True))
        return experts.cpu(), weights.cpu()


def _keeper(passes: deque[torch.Tensor]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    """Make a hook that keeps a copy of the last token's state, and not the whole prompt's that it is a part of."""

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        passes.append(inputs[0].reshape(-1, inputs[0].shape[-1])[-1].clone())

    return keep
