"""The settings of an evaluation, and of a trace of what routers choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moemerge.chats import COUNTED_ROLES
from moemerge.dtypes import ComputeDtype


@dataclass(frozen=True)
class EvaluationSettings:
    """What is run, over how much text, and on which device."""

    baselines: bool = False
    """Whether to run the weight average, the uniform mixture and the label oracle too."""
    tokens: int = 8192
    """Tokens that are read of each domain."""
    window: int = 512
    """Length in tokens of the pieces that text is read in."""
    roles: Sequence[str] = COUNTED_ROLES
    """Whose messages of chats count."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    compute_dtype: ComputeDtype = "auto"
    """`float32`, `bfloat16`, or `auto`, which is the faster one on a CPU."""
    ray: str | None = None
    """Address of a Ray cluster whose processes share the text, `local` to begin some; None for this process alone."""
    workers: int | None = None
    """How many processes; None for as many as there are GPUs, or CPUs."""
    kept_losses: Path | None = None
    """Folder that keeps losses of dense models, which are not run again over the same text; None keeps none."""
    rerun: bool = False
    """Whether to run every model, and to replace the losses that are kept."""


@dataclass(frozen=True)
class TraceSettings:
    """How much of each text is traced, and on which device."""

    tokens: int = 2000
    """Tokens that are read of each text, at most the model's context length."""
    layer: int | None = None
    """Number of a layer that has to have a router."""
    roles: Sequence[str] = COUNTED_ROLES
    """Whose messages of chats are shown."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    compute_dtype: ComputeDtype = "auto"
    """`float32`, `bfloat16`, or `auto`, which is the faster one on a CPU."""
    ray: str | None = None
    """Address of a Ray cluster whose processes share the texts, `local` to begin some; None for this process alone."""
    workers: int | None = None
    """How many processes; None for as many as there are GPUs, or CPUs."""
