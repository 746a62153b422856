"""Input and output of the pass over the base model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from moemerge.config.schema import RouterSettings
from moemerge.families.dense import ModelTensors
from moemerge.families.family import Scoring
from moemerge.families.mixture_shape import Mixture
from moemerge.passes.compute_dtype import Compute
from moemerge.routers.prompts import NEUTRAL, UNSORTED, EncodedPrompt


@dataclass(frozen=True)
class PassRequest:
    """A base model, the text that it reads, and the mixture that routers are made for."""

    base: ModelTensors
    mixture: Mixture
    scoring: Scoring
    prompts: tuple[EncodedPrompt, ...]
    compute: Compute
    settings: RouterSettings = field(default_factory=lambda: RouterSettings.model_validate({}))
    experts: tuple[ModelTensors, ...] = ()
    """Config and tensors of each routed expert, for methods that read their weights."""
    entering: bool = False
    """Whether to return the residual stream that enters each layer, too."""
    base_bits: Literal[4, 8] | None = None
    """Bits of the base model's Linear weights in the pass; None leaves them in the dtype of the pass."""
    low_memory: bool = False
    """Whether to read no weights ahead."""
    ray: str | None = None
    """Address of a Ray cluster whose processes share the prompts; None for this process alone."""
    workers: int | None = None
    """How many processes."""
    kept_states: Path | None = None
    """Folder that keeps router inputs from one merge to the next."""
    kept_fits: Path | None = None
    """Folder that keeps rows that were fitted to labelled tokens."""
    reported: bool = True
    """Whether to measure what the rows do with the prompts."""

    def absent(self, layer: int) -> frozenset[int]:
        """Experts that are absent from a layer."""
        return self.mixture.absent.get(layer, frozenset())

    def present(self, layer: int) -> list[int]:
        """Experts that are present in a layer, in ascending order."""
        return [expert for expert in range(len(self.mixture.expert_widths)) if expert not in self.absent(layer)]


@dataclass(frozen=True)
class RouterInputs:
    """The router inputs of one layer when the prompts pass through the base model."""

    layer: int
    states: torch.Tensor
    """States (token, hidden) in float32 that enter the FFN, for tokens that count."""
    prompt: torch.Tensor
    """Index in `prompts` of each token's prompt (token,)."""
    prompts: tuple[EncodedPrompt, ...]
    beginnings: torch.Tensor
    """States (prompt, hidden) in float32 that enter the FFN at each prompt's first token, which rarely counts."""
    entering: torch.Tensor | None = None
    """Residual stream (prompt, hidden) in float32 that enters the layer at each prompt's last token."""

    def _by_token(self, of: Callable[[EncodedPrompt], int]) -> torch.Tensor:
        return torch.tensor([of(prompt) for prompt in self.prompts])[self.prompt]

    @cached_property
    def expert(self) -> torch.Tensor:
        """Expert whose prompt each token is from (token,), `SHARED`, `UNSORTED` or `NEUTRAL`."""
        return self._by_token(lambda prompt: prompt.expert)

    @cached_property
    def positive(self) -> torch.Tensor:
        """Mask (token,) of the tokens from positive prompts."""
        return self._by_token(lambda prompt: prompt.positive).bool()

    @cached_property
    def document(self) -> torch.Tensor:
        """Number of the document that each token is from (token,); each prompt is one document."""
        return self._by_token(lambda prompt: prompt.document)

    @property
    def unsorted(self) -> torch.Tensor:
        """Mask (token,) of the tokens from text that is not sorted by expert."""
        return self.expert == UNSORTED

    @property
    def neutral(self) -> torch.Tensor:
        """Mask (token,) of the tokens from moemerge's own neutral text."""
        return self.expert == NEUTRAL

    @property
    def routed(self) -> torch.Tensor:
        """Mask (token,) of the tokens from positive prompts of routed experts."""
        return self.positive & (self.expert >= 0)

    def mean(self, expert: int, *, positive: bool) -> torch.Tensor:
        """Compute the mean state (hidden,) of an expert's positive or negative prompt tokens; NaN without any."""
        return self.states[(self.expert == expert) & (self.positive == positive)].mean(dim=0)


@dataclass(frozen=True)
class LayerRows:
    """The router of one layer."""

    rows: torch.Tensor
    """Rows (expert, hidden) in float32; zeros for absent experts."""
    held_out: tuple[float | None, ...] | None = None
    """Share of labelled tokens whose expert comes first by rows that were made without the token's document."""
