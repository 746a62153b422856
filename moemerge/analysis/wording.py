"""How sentences on an analysis write cosines, names and layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isnan
from typing import Final

NEAR: Final = 0.02
"""What a cosine lacks at most to be nearly 1: outputs that differ by a fifth of their length."""
ROUNDED: Final = 1e-7
"""What a cosine lacks at most to be 1 but for rounding."""
_MOST_NAMES: Final = 6


@dataclass(frozen=True)
class Advice:
    """A finding in words."""

    topic: str
    sentence: str
    is_notable: bool
    """Whether there is something to do or to know; otherwise the sentence says that there is nothing, and how much."""


def cosine(value: float) -> str:
    """Write a cosine with two decimals, and where it is nearly 1 as what is missing: `1 - 3.2e-05`."""
    missing = 1 - value
    if isnan(value) or missing > NEAR:
        return f"{round(value, 2) + 0.0:.2f}"  # no -0.00
    return f"1 - {missing:.2g}" if missing > ROUNDED else "1"


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Names in a row, of many the first few."""
    more = len(names) - _MOST_NAMES
    return separator.join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def named_layers(layers: Sequence[int]) -> str:
    """Name ascending layers by ranges, such as `layers 0-3, 7`, of many ranges the first few."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda one: one[1] - one[0])]
    ranges = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"layer{'' if len(layers) == 1 else 's'} {listed(ranges)}"


def named_experts(names: Sequence[str], layers: Sequence[int], found: Mapping[int, Sequence[int]]) -> list[str]:
    """Name experts with the layers that they were found in, such as `math (layers 0-3)`.

    Args:
        names: names of all experts.
        layers: all layers.
        found: numbers of the experts by layer.
    """
    named = []
    for expert in sorted({expert for experts in found.values() for expert in experts}):
        within = [layer for layer, experts in found.items() if expert in experts]
        where = "all layers" if len(within) == len(layers) else named_layers(within)
        named.append(f"{names[expert]} ({where})")
    return named
