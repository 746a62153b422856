"""What the pass over the base model is given, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from moemerge.checkpoint.header import StoredTensor
from moemerge.formats import Mixture
from moemerge.formats.dense import DenseModel
from moemerge.formats.family import Scoring
from moemerge.routers.prompts import SHARED, EncodedPrompt


@dataclass(frozen=True)
class RouterRequest:
    """A base model and the mixture that its layers become."""

    base: DenseModel
    tensors: Mapping[str, StoredTensor]
    mixture: Mixture
    scoring: Scoring
    prompts: tuple[EncodedPrompt, ...]
    """Of all experts; empty where the config has none."""
    device: torch.device
    base_bits: Literal[4, 8] | None = None
    """How many bits the weights of the base model's Linear layers have in the pass; None leaves them as computed."""
    low_memory: bool = False
    """Whether not to read ahead."""

    def absent(self, layer: int) -> frozenset[int]:
        """Experts that have no part in a layer."""
        return self.mixture.absent.get(layer, frozenset())


@dataclass(frozen=True)
class RouterInputs:
    """What the router of one layer sees when the prompts pass through the base model."""

    layer: int
    states: torch.Tensor
    """(token, hidden) float32: the state that enters the FFN."""
    expert: torch.Tensor
    """(token,) int: the expert whose prompt the token is from, `SHARED` for shared experts."""
    positive: torch.Tensor
    """(token,) bool: from a positive prompt, not a negative one."""

    @property
    def routed(self) -> torch.Tensor:
        """(token,) bool: from a positive prompt of an expert that the router chooses."""
        return self.positive & (self.expert != SHARED)

    def mean(self, expert: int, *, positive: bool) -> torch.Tensor:
        """(hidden,) mean state of an expert's positive or negative prompt tokens; NaN where there are none."""
        return self.states[(self.expert == expert) & (self.positive == positive)].mean(dim=0)
