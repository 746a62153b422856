"""Progress of what takes long: the task, and how much of it is done."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Unit = Literal["bytes", "layers", "parts", "steps", "tensors", "tokens"]
Stage = Literal[
    "shared weights",
    "text",
    "routers",
    "weights",
    "load",
    "layers",
    "teacher",
    "gate",
    "steps",
    "losses",
    "routes",
    "importance matrix",
    "quantised weights",
]
UNITS: Final[dict[Stage, Unit]] = {
    "shared weights": "layers",
    "text": "tokens",
    "routers": "layers",
    "weights": "bytes",
    "load": "layers",
    "layers": "layers",
    "teacher": "layers",
    "gate": "steps",
    "steps": "steps",
    "losses": "layers",
    "routes": "layers",
    "importance matrix": "layers",
    "quantised weights": "tensors",
}
"""Stages with what their amounts count; `text` counts the tokens of each sequence that an expert writes."""


@dataclass(frozen=True)
class Task:
    """A piece of work that progress is reported of."""

    stage: Stage
    name: str = ""
    """Name of the expert or model that it is about; empty where there is one task of this stage."""

    in_parts: bool = False
    """Whether several processes have a part of it each, which its amounts count."""

    @property
    def unit(self) -> Unit:
        """What its amounts count."""
        return "parts" if self.in_parts else UNITS[self.stage]

    def __str__(self) -> str:
        return f"{self.stage} of {self.name}" if self.name else self.stage


Progress = Callable[[Task, int, int], None]
"""A function that is called with a task, the amount done and the total.

Tasks may go on side by side: `weights` are written while `routers` are computed, and their reports alternate, from one
thread at a time.
"""


def adding_up(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Make a function that adds up the amounts it is given, and reports their sum and the total."""
    done = 0

    def report(amount: int) -> None:
        nonlocal done
        done += amount
        progress(done, total)

    return report
