"""One projection of FFNs of one shape, read once in blocks: sums that all its figures are made of."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.analysis.components import Numbers
from moemerge.analysis.matching import Places, Scores, spread
from moemerge.checkpoint.derived import read_values, stacks_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.jobs import MAX_THREADS
from moemerge.editing.pruning.similarity import clear_unequal
from moemerge.families.dense import Role

THREADS: Final = 2 * MAX_THREADS
"""How many blocks are read and summed at once: as one waits for the disk, another is summed."""
# Elements of all FFNs together that a thread holds: so many that they stay in the processor's cache, or that products
# of neurons are worth their start.
_ELEMENTS: Final = 2**19
_MATCHED_ELEMENTS: Final = 2**24
_LEAST_ELEMENTS: Final = 2**14
_PRODUCTS: Final = 2**18  # multiplications up to which OpenBLAS starts no threads
_LEAST_LENGTH: Final = 512


@dataclass(frozen=True)
class Sums:
    """Sums over the weights of one projection of several FFNs."""

    products: Numbers
    """Products (FFN, FFN) of the first FFN's matrix, and of the others less the first: what tells nearly equal ones
    apart is not lost in what they share."""
    totals: Numbers
    """Sums over all neurons (FFN, hidden)."""
    equal: NDArray[np.bool_]
    """Whether two FFNs have equal numbers (FFN, FFN)."""
    neurons: NDArray[np.float32]
    """Weights of the neurons that were asked for (FFN, neuron, hidden)."""
    scores: Scores | None
    """Products of neurons, where they were asked for."""

    @property
    def whole_products(self) -> Numbers:
        """Products (FFN, FFN) of the matrices as they are."""
        away = self.products[0].copy()
        away[0] = 0
        whole: Numbers = self.differences + away[:, None] + away + self.products[0, 0]
        return whole

    @property
    def differences(self) -> Numbers:
        """Products (FFN, FFN) of all matrices less the first."""
        differences = self.products.copy()
        differences[0] = differences[:, 0] = 0
        return differences


@dataclass(frozen=True)
class Wanted:
    """What is read of a projection beside sums."""

    neurons: Places
    """Numbers of the neurons whose weights are kept."""
    matched: int = 0
    """Number of neurons of each FFN that are multiplied with all of each; 0 for none."""


def read_projection(tensors: Sequence[TensorInfo], role: Role, wanted: Wanted, pool: Executor) -> Sums:
    """Read one projection of several FFNs, each number once; but twice the rows of neurons that are matched.

    Args:
        tensors: the matrices, all of one shape: (width, hidden), or (hidden, width) for `down`.
        role: the projection.
        wanted: what is read beside sums.
        pool: threads that do it, `THREADS` of them.

    Raises:
        CheckpointError: a file ends too early.
    """
    rows, columns = tensors[0].shape
    width = columns if role == "down" else rows
    scores = None
    if wanted.matched:
        places = spread(wanted.matched, width)
        samples = None if role == "down" else _rows_of(tensors, places, pool)
        scores = Scores(places, samples, len(tensors), width)
    elements = _MATCHED_ELEMENTS if scores else _ELEMENTS
    step = max(1, elements // (len(tensors) * columns), _LEAST_ELEMENTS // columns)
    share = -(-rows // (THREADS * step)) * step
    parts = [
        pool.submit(_Part(role, tensors, wanted.neurons, scores).read, first, min(share, rows - first), step)
        for first in range(0, rows, share)
    ]
    read = [part.result() for part in parts]
    return Sums(
        sum((part.products for part in read), np.zeros(1)),
        sum((part.totals for part in read), np.zeros(1)),
        np.logical_and.reduce([part.equal for part in read]),
        sum((part.neurons for part in read), np.zeros(1, np.float32)),
        scores,
    )


def _rows_of(tensors: Sequence[TensorInfo], places: Places, pool: Executor) -> NDArray[np.float32]:
    """Some rows of each matrix (matrix and row, width)."""
    if len(places) == tensors[0].shape[0]:
        return np.concatenate(list(pool.map(read_values, tensors)))
    return np.concatenate(
        list(pool.map(read_values, (tensor.rows(int(place), 1) for tensor in tensors for place in places)))
    )


class _Part:
    """Sums over some rows."""

    def __init__(self, role: Role, tensors: Sequence[TensorInfo], neurons: Places, scores: Scores | None) -> None:
        self._role, self._tensors, self._places, self._scores = role, tensors, neurons, scores
        count, (rows, columns) = len(tensors), tensors[0].shape
        hidden = rows if role == "down" else columns
        self.products, self.totals = np.zeros((count, count)), np.zeros((count, hidden))
        self.equal = np.ones((count, count), bool)
        self.neurons = np.zeros((count, len(neurons), hidden), np.float32)

    def read(self, first: int, count: int, step: int) -> "_Part":
        """Read so many rows from row `first` on, `step` at once."""
        for row, block in stacks_of([tensor.rows(first, count) for tensor in self._tensors], step):
            self._add(first + row, block)
        return self

    def _add(self, row: int, block: NDArray[np.float32]) -> None:
        """Add some rows of all matrices (matrix, row, column); they are overwritten."""
        if self.equal.sum() > len(block):
            clear_unequal(self.equal, list(block))
        span = slice(row, row + block.shape[1])
        if self._role == "down":
            self.totals[:, span] = np.einsum("frc->fr", block)
            self.neurons[:, :, span] = block[:, :, self._places].transpose(0, 2, 1)
        else:
            self.totals += block.sum(axis=1)
            held = (self._places >= span.start) & (self._places < span.stop)
            self.neurons[:, held] = block[:, self._places[held] - row]
        if self._scores:
            self._scores.add(row, block)
        block[1:] -= block[0]
        self._multiply(block.reshape(len(block), -1))

    def _multiply(self, flat: NDArray[np.float32]) -> None:
        """Add the products of a block (matrix, element), the first matrix and the others less it.

        Sums are short in float32, and so small that BLAS gives them to no further threads. The first matrix is left out
        on one side, since numpy would call the slower `syrk` for a matrix with itself.
        """
        length = min(max(_PRODUCTS // len(flat) ** 2, _LEAST_LENGTH), flat.shape[1])
        whole = flat.shape[1] // length * length
        for part in (flat[:, :whole].reshape(len(flat), -1, length), flat[:, None, whole:]):
            pieces = part.transpose(1, 0, 2)
            products = np.matmul(pieces[:, 1:], pieces.transpose(0, 2, 1)).sum(axis=0, dtype=np.float64)
            self.products[1:] += products
            self.products[0, 1:] += products[:, 0]
            self.products[0, 0] += np.einsum("pe,pe->p", part[0], part[0]).sum(dtype=np.float64)
