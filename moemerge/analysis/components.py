"""Cosines and principal components of vectors that are known by their products alone."""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
# Numbers that differ by less are taken for equal, so that rounding does not choose the sign.
_TIE = 1e-6


def cosines(products: Numbers) -> Numbers:
    """Cosines of vectors from the products of all pairs (vector, vector); NaN for a vector that is 0."""
    lengths = np.sqrt(products.diagonal())
    lengths[lengths == 0] = np.nan
    found: Numbers = np.clip(products / np.outer(lengths, lengths), -1, 1)
    return found


def cosines_of(vectors: Numbers) -> Numbers:
    """Cosines of vectors (vector, element); NaN for a vector that is 0 or has NaNs."""
    return cosines(vectors @ vectors.T)


def principal(products: Numbers) -> Numbers:
    """Coordinates of vectors on their first two principal components (vector, 2).

    The sign of a component is such that its largest coordinate, by magnitude, is positive.

    Args:
        products: products of all pairs (vector, vector), after any one vector was taken away from all.
    """
    centred = products - products.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    squares, directions = np.linalg.eigh(centred)
    found = np.zeros((len(products), 2))
    for place, component in enumerate(range(len(squares) - 1, max(len(squares) - 3, -1), -1)):
        direction = directions[:, component]
        largest = int((np.abs(direction) >= np.abs(direction).max() * (1 - _TIE)).argmax())
        found[:, place] = direction * np.sign(direction[largest]) * np.sqrt(max(squares[component], 0))
    return found


def correlation(one: Numbers, other: Numbers) -> float:
    """Pearson's correlation of two series, over the places where both have numbers.

    It is NaN with fewer than three such places, or where one series does not vary.
    """
    both = np.isfinite(one) & np.isfinite(other)
    one, other = one[both], other[both]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:  # noqa: PLR2004
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])
