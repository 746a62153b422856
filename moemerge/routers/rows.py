"""Arithmetic on router rows that more than one method needs, without torch."""

from collections.abc import Sequence
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]

_NOISE: Final = 1e-5
_TINY: Final = np.float32(np.finfo(np.float32).tiny)


def contrast(positive: Rows, negative: Rows, absent: frozenset[int] = frozenset()) -> Rows:
    """Make router rows from mean vectors of the text that should, and should not, reach each expert.

    Directions are compared, not lengths, and an expert without negative prompts is set against the mean of all
    positives: otherwise it would keep the direction that all text shares, and win every token. Rows are centred over
    the experts, which changes no choice of a softmax router and saves bfloat16 mantissa.

    Args:
        positive: (expert, hidden) mean over positive prompt tokens.
        negative: (expert, hidden) mean over negative prompt tokens; NaN rows for experts without any.
        absent: experts that the router must not choose.

    Returns:
        Rows (expert, hidden) with a mean length of 1, not finite where `positive` is not; zeros for absent experts.
    """
    present = [expert for expert in range(len(positive)) if expert not in absent]
    rows = np.zeros_like(positive)
    rows[present] = _contrast(positive[present], negative[present])
    return rows


@np.errstate(invalid="ignore", over="ignore")
def _contrast(positive: Rows, negative: Rows) -> Rows:
    positive, negative = unit(positive), unit(negative)
    missing = np.isnan(negative).any(axis=1, keepdims=True)
    rows: Rows = positive - np.where(missing, positive.mean(axis=0), negative)
    rows = rows - rows.mean(axis=0)
    length = _lengths(rows).mean()
    # The rounding errors between equal directions carry no information, and must not be scaled up.
    if length <= _NOISE:
        return np.zeros_like(rows)
    scaled: Rows = rows / length
    return scaled


def unit(vectors: Rows) -> Rows:
    """Scale vectors (expert, hidden) to length 1; zero stays zero."""
    lengths: Rows = np.maximum(_lengths(vectors), _TINY)
    return vectors / lengths[:, None]


def row_distances(rows: Rows, absent: Sequence[frozenset[int]] = ()) -> dict[tuple[int, int], float]:
    """Measure how far apart each pair of experts' rows (layer, expert, hidden) are: 0 for equal, 1 for opposite.

    The mean row of a layer, which changes no choice, is taken away first. `absent` lists each layer's absent experts;
    a pair is compared in the layers that both are in.
    """
    present = np.ones(rows.shape[:2], bool)
    for layer, experts in enumerate(absent):
        present[layer, list(experts)] = False
    counts = present.sum(axis=1, dtype=np.float32)[:, None, None]
    rows = rows - np.where(present[..., None], rows, 0).sum(axis=1, keepdims=True) / counts
    distances = {}
    for a, b in combinations(range(rows.shape[1]), 2):
        both = present[:, a] & present[:, b]
        if not both.any():
            continue
        first, second = rows[both, a], rows[both, b]
        lengths = np.maximum(_lengths(first) + _lengths(second), _TINY)
        distances[a, b] = float((_lengths(first - second) / lengths).mean())
    return distances


def _lengths(vectors: Rows) -> Rows:
    """Compute the lengths (vector,) of vectors (vector, hidden)."""
    lengths: Rows = np.sqrt(np.square(vectors).sum(axis=1))
    return lengths
