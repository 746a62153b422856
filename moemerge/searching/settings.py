"""The settings of a search."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from moemerge.chats import COUNTED_ROLES
from moemerge.dtypes import ComputeDtype

Objective = Literal["mean", "worst"]
"""The mean loss over domains; or the most that the loss on a domain is above that of its own dense expert."""
Cost = Literal["bytes", "active"]
"""The size of the weights in bytes, or the number of parameters that a token passes through."""

TOGETHER: Final = 8
"""Recipes that are proposed and tried together, whatever the number of workers, which would else change the search."""


@dataclass(frozen=True)
class SearchSettings:
    """How many recipes are tried, by what they are judged, and on how much text."""

    trials: int = 24
    """How many recipes are tried."""
    seed: int = 0
    """Seed for which recipes are tried, and which documents are held out; merges keep theirs."""
    objective: Objective = "mean"
    """What is to be as small as possible."""
    cost: Cost | None = None
    """What is to be small beside it, if anything."""
    tokens: int = 8192
    """Tokens that are read of each domain to search by, and as many of its held-out text."""
    window: int = 512
    """Length in tokens of the pieces that text is read in."""
    roles: Sequence[str] = COUNTED_ROLES
    """Whose messages of chats count."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    compute_dtype: ComputeDtype = "auto"
    """`float32`, `bfloat16`, or `auto`, which is the faster one on a CPU."""
    kept_states: Path | None = None
    """Folder that keeps router inputs of base models; None for one that is removed when the search ends."""
    kept_losses: Path | None = None
    """Folder that keeps losses of dense models; None keeps none."""
    ray: str | None = None
    """Address of a Ray cluster whose processes try recipes, `local` to begin some; None for this process alone."""
    workers: int | None = None
    """How many processes; None for as many as there are GPUs, or CPUs."""
