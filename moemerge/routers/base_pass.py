"""What the pass over the base model is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from moemerge.config.schema import RouterSettings
from moemerge.families.dense import ModelTensors
from moemerge.families.family import Scoring
from moemerge.families.mixture import Mixture
from moemerge.routers.prompts import SHARED, UNSORTED, EncodedPrompt


@dataclass(frozen=True)
class PassRequest:
    """A base model, what it reads, and the mixture that its layers become."""

    base: ModelTensors
    mixture: Mixture
    scoring: Scoring
    prompts: tuple[EncodedPrompt, ...]
    device: torch.device
    settings: RouterSettings = field(default_factory=lambda: RouterSettings.model_validate({}))
    experts: tuple[ModelTensors, ...] = ()
    """The models whose FFNs are chosen between, for methods that read their weights."""
    entering: bool = False
    """Whether the residual stream that enters each layer is wanted too."""
    base_bits: Literal[4, 8] | None = None
    """How many bits the weights of the base model's Linear layers have in the pass; None leaves them as computed."""
    low_memory: bool = False
    """Whether not to read ahead."""

    def absent(self, layer: int) -> frozenset[int]:
        """Experts that have no part in a layer."""
        return self.mixture.absent.get(layer, frozenset())

    def present(self, layer: int) -> list[int]:
        """Experts that have."""
        return [expert for expert in range(len(self.mixture.expert_widths)) if expert not in self.absent(layer)]


@dataclass(frozen=True)
class RouterInputs:
    """What the router of one layer sees when the prompts pass through the base model."""

    layer: int
    states: torch.Tensor
    """(token, hidden) float32: the state that enters the FFN, of the tokens that count."""
    prompt: torch.Tensor
    """(token,) int: the place in `prompts` of the one that the token is from."""
    prompts: tuple[EncodedPrompt, ...]
    beginnings: torch.Tensor
    """(prompt, hidden) float32: the state that enters the FFN at each prompt's first token, which rarely counts."""
    entering: torch.Tensor | None = None
    """(prompt, hidden) float32: the residual stream that enters the layer at each prompt's last token."""

    def _by_token(self, of: Callable[[EncodedPrompt], int]) -> torch.Tensor:
        return torch.tensor([of(prompt) for prompt in self.prompts])[self.prompt]

    @cached_property
    def expert(self) -> torch.Tensor:
        """(token,) int: the expert whose prompt the token is from, or `SHARED` or `UNSORTED`."""
        return self._by_token(lambda prompt: prompt.expert)

    @cached_property
    def positive(self) -> torch.Tensor:
        """(token,) bool: from a positive prompt, not a negative one."""
        return self._by_token(lambda prompt: prompt.positive).bool()

    @cached_property
    def document(self) -> torch.Tensor:
        """(token,) int: the document that the token is from; each prompt is one."""
        return self._by_token(lambda prompt: prompt.document)

    @property
    def unsorted(self) -> torch.Tensor:
        """(token,) bool: from text that is not sorted by expert."""
        return self.expert == UNSORTED

    @property
    def routed(self) -> torch.Tensor:
        """(token,) bool: from a positive prompt of an expert that the router chooses."""
        return self.positive & (self.expert != SHARED) & ~self.unsorted

    def mean(self, expert: int, *, positive: bool) -> torch.Tensor:
        """(hidden,) mean state of an expert's positive or negative prompt tokens; NaN where there are none."""
        return self.states[(self.expert == expert) & (self.positive == positive)].mean(dim=0)


@dataclass(frozen=True)
class LayerRows:
    """The router of one layer."""

    rows: torch.Tensor
    """(expert, hidden) float32; zeros for experts that are absent."""
    held_out: float | None = None
    """Share of labelled tokens for which rows that were made without their documents choose the right expert first."""
