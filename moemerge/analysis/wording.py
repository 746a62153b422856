"""How sentences on an analysis write cosines, names and layers."""

from collections.abc import Sequence
from itertools import groupby
from math import isnan
from typing import Final

NEAR: Final = 0.02
"""What a cosine lacks at most to be nearly 1: outputs that differ by a fifth of their length."""
ROUNDED: Final = 1e-7
"""What a cosine lacks at most to be 1 but for rounding."""
_MOST_NAMES: Final = 6


def cosine(value: float) -> str:
    """Write a cosine with two decimals, and where it is nearly 1 as what is missing: `1 - 3e-05`."""
    missing = 1 - value
    if isnan(value) or missing > NEAR:
        return f"{value:.2f}"
    return f"1 - {missing:.1g}" if missing > ROUNDED else "1"


def listed(names: Sequence[str]) -> str:
    """Names in a row, of many the first few."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def named_layers(layers: Sequence[int]) -> str:
    """Name layers, such as `layers 0-3, 7`."""
    return f"layer{'' if len(layers) == 1 else 's'} {_ranges(layers)}"


def _ranges(layers: Sequence[int]) -> str:
    """Write ascending layers as ranges, such as `0-3, 7`."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda one: one[1] - one[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
