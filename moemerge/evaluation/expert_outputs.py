"""What an expert of a stored mixture makes of the states that enter it: its FFN, computed by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from moemerge.evaluation.runnable import MixtureModel
from moemerge.families.dense import Role
from moemerge.passes.activation import activation_of, class_config
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.weights import read_into

_TOKENS: Final = 1024


@dataclass(frozen=True)
class Expert:
    """One expert's FFN in memory, on the device and in the dtype of its matrices."""

    gate: torch.Tensor
    """(width, hidden)."""
    up: torch.Tensor
    """(width, hidden)."""
    down: torch.Tensor
    """(hidden, width)."""
    activation: Callable[[torch.Tensor], torch.Tensor]

    def on(self, device: torch.device) -> "Expert":
        """The same expert on another device."""
        return Expert(self.gate.to(device), self.up.to(device), self.down.to(device), self.activation)

    def activated(self, states: torch.Tensor) -> torch.Tensor:
        """Compute the intermediate states (token, width) of states `z` (token, hidden): `activation(gate(z))`."""
        return self.activation(states @ self.gate.T)

    def output(self, states: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        """Compute the output (token, hidden) of states and what is `activated` of them."""
        return (activated * (states @ self.up.T)) @ self.down.T


class ExpertOutputs:
    """Computes outputs of experts one at a time; one expert's matrices are in memory."""

    def __init__(self, mixture: MixtureModel, compute: Compute) -> None:
        self._stored = mixture.as_stored
        self._activation = activation_of(class_config(mixture.family.model_type, mixture.runnable.keys))
        self._compute = compute

    def __call__(self, layer: int, expert: int, states: torch.Tensor) -> torch.Tensor:
        """Compute `down(activation(gate(z)) * up(z))` of states (token, hidden): (token, hidden) in float32.

        Raises:
            CheckpointError: the expert's file ends too early.
        """
        ffn = self.expert(layer, expert)
        made = torch.empty(states.shape)
        with torch.inference_mode():
            for first in range(0, len(states), _TOKENS):
                some = states[first : first + _TOKENS].to(device=self._compute.device, dtype=self._compute.dtype)
                made[first : first + _TOKENS] = ffn.output(some, ffn.activated(some)).float().cpu()
        return made

    def expert(self, layer: int, expert: int) -> Expert:
        """Read an expert of a layer.

        Raises:
            CheckpointError: its file ends too early.
        """
        gate, up, down = (self._matrix(layer, expert, role) for role in ("gate", "up", "down"))
        return Expert(gate, up, down, self._activation)

    def _matrix(self, layer: int, expert: int, role: Role) -> torch.Tensor:
        stored = self._stored.projection(layer, expert, role)
        matrix = torch.empty(stored.shape, device=self._compute.device, dtype=self._compute.dtype)
        read_into(stored, matrix)
        return matrix
