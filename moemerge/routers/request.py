"""What the pass over the base model is given, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moemerge.checkpoint.header import StoredTensor
from moemerge.config import Expert
from moemerge.formats.dense import DenseModel
from moemerge.routers.prompts import EncodedPrompt


@dataclass(frozen=True)
class RouterRequest:
    """A base model and the experts to choose between."""

    folder: Path
    """The base model's folder, for its tokenizer and its `config.json`."""
    base: DenseModel
    tensors: Mapping[str, StoredTensor]
    experts: tuple[Expert, ...]
    prompts: tuple[EncodedPrompt, ...]
    """Of all experts; empty where the config has none."""
    experts_per_token: int
    device: torch.device
    base_bits: Literal[4, 8] | None = None
    """How many bits the weights of the base model's Linear layers have in the pass; None leaves them as computed."""
    low_memory: bool = False
    """Whether not to read ahead."""


@dataclass(frozen=True)
class RouterInputs:
    """What the router of one layer sees when the prompts pass through the base model."""

    states: torch.Tensor
    """(token, hidden) float32: the normed state that enters the FFN."""
    expert: torch.Tensor
    """(token,) int: the expert whose prompt the token is from."""
    positive: torch.Tensor
    """(token,) bool: from a positive prompt, not a negative one."""

    def mean(self, expert: int, *, positive: bool) -> torch.Tensor:
        """(hidden,) mean state of an expert's positive or negative prompt tokens; NaN where there are none."""
        return self.states[(self.expert == expert) & (self.positive == positive)].mean(dim=0)
