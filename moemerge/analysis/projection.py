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
from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.jobs import MAX_THREADS
from moemerge.editing.pruning.similarity import clear_unequal
from moemerge.errors import CheckpointError
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
_SMALL: Final = 0.1


@dataclass(frozen=True)
class Sums:
    """Sums over the weights of one projection of several FFNs."""

    squares: Numbers
    """Sum of the squares of each FFN's matrix (FFN,)."""
    products: Numbers
    """Products (FFN, FFN) of the matrices as they are."""
    differences: Numbers
    """Products (FFN, FFN) of all matrices less the first: what tells nearly equal ones apart is not lost in what they
    share."""
    beyond: Numbers
    """Products (FFN,) of the first FFN's matrix with the others less it; 0 for itself."""
    totals: Numbers
    """Sums over all neurons (FFN, hidden)."""
    equal: NDArray[np.bool_]
    """Whether two FFNs have equal numbers (FFN, FFN)."""
    neurons: NDArray[np.float32]
    """Weights of the neurons that were asked for (FFN, neuron, hidden)."""
    scores: Scores | None
    """Products of neurons, where they were asked for."""

    @property
    def cosines(self) -> Numbers:
        """Cosines (FFN, FFN) of the matrices; NaN for a matrix that is 0.

        For FFNs near the first one, `1 - cosine` is as precise as their differences.
        """
        lengths = np.sqrt(self.products.diagonal())
        lengths[lengths == 0] = np.nan
        both = np.outer(lengths, lengths)
        # By how much each squared length is larger than the first one's.
        beyond = self.differences.diagonal() + 2 * self.beyond
        longer = (beyond[:, None] - beyond) / (lengths[:, None] + lengths)
        by_differences = 1 - (_apart(self.differences) - longer**2) / (2 * both)
        found: Numbers = np.clip(np.where(self._near_first, by_differences, self.products / both), -1, 1)
        return found

    @property
    def apart(self) -> Numbers:
        """Squared lengths (FFN, FFN) of the differences of two FFNs' matrices."""
        found: Numbers = np.where(self._near_first, _apart(self.differences), _apart(self.products))
        return found

    @property
    def _near_first(self) -> NDArray[np.bool_]:
        """Whether two FFNs (FFN, FFN) are so near the first one that less of `differences` is lost by rounding."""
        away, lengths = self.differences.diagonal(), np.sqrt(self.squares)
        near: NDArray[np.bool_] = away[:, None] + away < np.outer(lengths, lengths)
        return near


def _apart(products: Numbers) -> Numbers:
    """Squared distances of vectors from their products (vector, vector)."""
    squares = products.diagonal()
    found: Numbers = squares[:, None] + squares - 2 * products
    return found


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
        CheckpointError: a file ends too early, or holds numbers that are not finite, or too large to compare.
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
    names = ("squares", "totals", "moved", "moved_beside", "direct")
    squares, totals, moved, beside, direct = (sum(getattr(part, name) for part in read) for name in names)
    if not np.isfinite(squares).all():
        raise _not_finite(tensors, squares)
    differences, beyond, first = _split(moved)
    others, further, _ = _split(beside)
    return Sums(
        squares,
        direct + differences + beyond[:, None] + beyond + first,
        differences + others,
        beyond + further,
        totals,
        np.logical_and.reduce([part.equal for part in read]),
        sum((part.neurons for part in read), np.zeros(1, np.float32)),
        scores,
    )


def _split(moved: Numbers) -> tuple[Numbers, Numbers, float]:
    """Split products of the first matrix and the others less it: of the latter, of both, and the first's square."""
    differences, beyond = moved.copy(), moved[0].copy()
    differences[0] = differences[:, 0] = beyond[0] = 0
    return differences, beyond, moved[0, 0]


def _not_finite(tensors: Sequence[TensorInfo], squares: Numbers) -> CheckpointError:
    """The error for matrices some of whose sums of squares are not finite."""
    broken = tensors[int(np.isfinite(squares).argmin())]
    why = first_not_finite([broken]) or (
        f"{broken.name} of {broken.path} holds numbers that are too large to compare: float32 cannot express the sum "
        "of their squares"
    )
    return CheckpointError(f"{why}. Download that file again.")


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
        self.squares, self.totals = np.zeros(count), np.zeros((count, hidden))
        # Products of the first matrix and the others less it; of blocks with small matrices apart, and as they are.
        self.moved, self.moved_beside, self.direct = np.zeros((3, count, count))
        self.equal = np.ones((count, count), bool)
        self.neurons = np.zeros((count, len(neurons), hidden), np.float32)

    def read(self, first: int, count: int, step: int) -> "_Part":
        """Read so many rows from row `first` on, `step` at once."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for
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
        flat = block.reshape(len(block), -1)
        squares = sum(
            np.matmul(part[:, :, None], part[..., None]).sum(axis=(1, 2, 3), dtype=np.float64) for part in _pieces(flat)
        )
        self.squares += squares
        # Of a matrix much smaller than the first one, rounding leaves nothing when that is taken away and added again.
        is_small = squares.min() < _SMALL * squares[0]
        if is_small:
            self.direct += _products(flat)
        block[1:] -= block[0]
        moved = self.moved_beside if is_small else self.moved
        moved += _products(flat)


def _pieces(flat: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cut a block (matrix, element) into pieces (matrix, piece, element), so short that float32 does for their sums."""
    length = min(max(_PRODUCTS // len(flat) ** 2, _LEAST_LENGTH), flat.shape[1])
    whole = flat.shape[1] // length * length
    return flat[:, :whole].reshape(len(flat), -1, length), flat[:, None, whole:]


def _products(flat: NDArray[np.float32]) -> Numbers:
    """The products (matrix, matrix) of a block (matrix, element).

    Pieces are so small that BLAS gives them to no further threads. The first matrix is left out on one side, since
    numpy would call the slower `syrk` for a matrix with itself.
    """
    found = np.zeros((len(flat), len(flat)))
    for part in _pieces(flat):
        pieces = part.transpose(1, 0, 2)
        found[1:] += np.matmul(pieces[:, 1:], pieces.transpose(0, 2, 1)).sum(axis=0, dtype=np.float64)
        found[0, 0] += np.einsum("pe,pe->p", part[0], part[0]).sum(dtype=np.float64)
    found[0, 1:] = found[1:, 0]
    return found
