"""Neurons of two FFNs matched one to one: which neurons and layers, their products, and the assignment by scipy."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
"""Numbers of neurons, ascending."""
_COUNTS: Final = (512, 256, 128, 64, 32, 16)
_ALL: Final = 2048  # of wider FFNs, not all neurons are matched
_FEW_LAYERS: Final = 3
# Multiplications and additions of a whole model: as many as fit beside reading it, or some 10 seconds if that is more.
_BY_ELEMENT: Final = 32
_LEAST: Final = 6e11
_MOST_BYTES: Final = 300_000_000


@dataclass(frozen=True)
class Matching:
    """What is matched of a model: some neurons of each FFN, with all of every other."""

    neurons: int
    """Number of neurons of each FFN, evenly spread; 0 for none."""
    layers: frozenset[int]
    """Numbers of the layers."""


NOTHING: Final = Matching(0, frozenset())


def choose_matching(layers: Sequence[int], ffns: int, width: int, hidden: int) -> Matching:
    """Choose how many neurons are matched, in which layers, so that it takes no longer than reading half the model.

    It is as many neurons as can be matched in all layers; if there are no such, as many as can in three layers, evenly
    spread, or in one or two. Nothing is matched without scipy.

    Args:
        layers: numbers of the layers with routers.
        ffns: number of FFNs of one width in each.
        width: their number of neurons.
        hidden: length of a neuron's weights.
    """
    if find_spec("scipy") is None or ffns < 2:  # noqa: PLR2004
        return NOTHING
    budget = max(_LEAST, _BY_ELEMENT * 3 * ffns * width * hidden * len(layers))
    counts = sorted({min(width, count) for count in (*((_ALL,) if width <= _ALL else ()), *_COUNTS)}, reverse=True)
    fitting = [count for count in counts if 4 * ffns**2 * count * width <= _MOST_BYTES]
    matched = {count: int(min(len(layers), budget // _cost(count, ffns, width, hidden))) for count in fitting}
    for least in (len(layers), min(_FEW_LAYERS, len(layers)), 1):
        for count, number in matched.items():
            if number >= least:
                return Matching(count, frozenset(layers[place] for place in spread(number, len(layers))))
    return NOTHING


def _cost(count: int, ffns: int, width: int, hidden: int) -> int:
    """What a layer takes, counted in multiplications of products; the assignment was measured to take the rest."""
    return 3 * ffns**2 * count * width * (hidden + 512 + 4096 * count // width)


def spread(count: int, total: int) -> Places:
    """Choose `count` of `total` places, evenly spread, each in the middle of its part."""
    return (2 * np.arange(count) + 1) * total // (2 * count)


class Scores:
    """Products of some neurons of each FFN with all neurons of each, added up block by block, by several threads."""

    def __init__(self, places: Places, samples: NDArray[np.float32] | None, ffns: int, width: int) -> None:
        """Begin with zeros.

        Args:
            places: numbers of the chosen neurons.
            samples: weights of the chosen neurons (FFN and neuron, hidden) where neurons are rows; None where they are
                columns, whose weights are in the blocks.
            ffns: number of FFNs.
            width: number of neurons of each.
        """
        self._places, self._samples = places, samples
        self._products = np.zeros((ffns, ffns * len(places), width), np.float32)
        self._squares = np.zeros((ffns, width))
        self._lock = threading.Lock()

    def add(self, row: int, block: NDArray[np.float32]) -> None:
        """Add some rows of all FFNs (FFN, row, column), the first of which has the number `row`."""
        if self._samples is not None:
            span = slice(row, row + block.shape[1])
            self._squares[:, span] = np.einsum("frc,frc->fr", block, block)
            for products, rows in zip(self._products, block, strict=True):
                products[:, span] = self._samples @ rows.T
            return
        chosen = block[:, :, self._places].transpose(0, 2, 1).reshape(-1, block.shape[1])
        squares = np.einsum("frc,frc->fc", block, block)
        for ffn, rows in enumerate(block):
            product = chosen @ rows
            with self._lock:
                self._products[ffn] += product
        with self._lock:
            self._squares += squares

    def cosines(self, one: int, other: int) -> NDArray[np.float64]:
        """Cosines of the chosen neurons of one FFN with all of another (neuron, neuron); 0 for neurons that are 0."""
        count, lengths = len(self._places), np.sqrt(self._squares)
        products = self._products[other, one * count : (one + 1) * count]
        both = np.outer(lengths[one, self._places], lengths[other])
        cosines: NDArray[np.float64] = np.divide(products, both, out=np.zeros_like(both), where=both > 0)
        return cosines


def match(cosines: NDArray[np.float64]) -> tuple[float, float]:
    """Match neurons so that the sum of their cosines is the largest.

    Args:
        cosines: cosines (neuron, neuron) of the neurons of one FFN, at most as many as the other has.

    Returns:
        The mean cosine of those matched, and Kendall's tau between the orders of both; NaN for a single neuron.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosines, maximize=True)
    pairs = len(rows) * (len(rows) - 1)
    order = float(np.sign(columns[None] - columns[:, None])[np.triu_indices(len(rows), 1)].sum())
    return float(cosines[rows, columns].mean()), 2 * order / pairs if pairs else np.nan
