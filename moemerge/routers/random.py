"""Routers that know nothing: for models that will be trained, and as baselines. Made without torch.

A router input is a normed state of length about sqrt(hidden). Rows with elements of standard deviation
1/sqrt(hidden) therefore give logits of about 1; with N(0, 1) the softmax would be saturated from the start.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from moemerge.routers.rows import Rows


def normal_rows(shape: tuple[int, int, int], seed: int) -> Rows:
    """Rows (layer, expert, hidden) from N(0, 1/hidden), seeded."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-1]))


def uniform_rows(shape: tuple[int, int, int], seed: int) -> Rows:
    """Rows (layer, expert, hidden) from U(-1/sqrt(hidden), 1/sqrt(hidden)), as `torch.nn.Linear` starts, seeded."""
    rows = np.random.default_rng(seed).random(shape, np.float32) * 2 - 1
    return rows / np.float32(math.sqrt(shape[-1]))


DRAWN: Final[dict[str, Callable[[tuple[int, int, int], int], Rows]]] = {
    "random": normal_rows,
    "uniform_random": uniform_rows,
}
