"""Routers that know nothing: for models that will be trained, and as baselines. Made without torch.

A router input is a normed state of length about sqrt(hidden). Rows with elements of standard deviation
1/sqrt(hidden) therefore give logits of about 1; with N(0, 1) the softmax would be saturated from the start.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.config import GateMode

Rows = NDArray[np.float32]
"""(layer, expert, hidden)"""


def normal_rows(shape: tuple[int, int, int], seed: int) -> Rows:
    """Rows from N(0, 1/hidden), seeded."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-1]))


def uniform_rows(shape: tuple[int, int, int], seed: int) -> Rows:
    """Rows from U(-1/sqrt(hidden), 1/sqrt(hidden)), as `torch.nn.Linear` starts, seeded."""
    rows = np.random.default_rng(seed).random(shape, np.float32) * 2 - 1
    return rows / np.float32(math.sqrt(shape[-1]))


DRAWN: Final[dict[GateMode, Callable[[tuple[int, int, int], int], Rows]]] = {
    "random": normal_rows,
    "uniform_random": uniform_rows,
}


def stored_bytes(rows: Rows, dtype: str) -> list[bytes]:
    """Each layer's rows as they are stored, rounded to the nearest, ties to even."""
    if dtype == "bfloat16":  # the upper half of a float32, which numpy has no type for
        bits = rows.astype("<f4").view("<u4")
        return [layer.tobytes() for layer in ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")]
    return [layer.tobytes() for layer in rows.astype({"float16": "<f2", "float32": "<f4"}[dtype])]
