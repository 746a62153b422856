"""How far apart the FFNs of a mixture's experts are: equal ones, and distances between the others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.derived import blocks_of, read_values
from moemerge.families.dense import ROLES
from moemerge.families.stored_mixture import StoredMixture

# Fine-tunes of one base are nearer to each other than rounding may suggest, so that only other pairs tell what is near.
_NEAR: Final = 0.1


@dataclass(frozen=True)
class Similarity:
    """Distances and equalities of experts in every layer with a router, in the order of `layers`."""

    layers: tuple[int, ...]
    """Numbers of the layers."""
    distances: NDArray[np.float64]
    """Length of the difference of two experts' weights (layer, expert, expert), relative to the root of the mean of
    their squared lengths; all three projections count."""
    equal: NDArray[np.bool_]
    """Whether two experts have equal numbers in all that is theirs but router row and selection bias (layer, expert,
    expert)."""

    def groups(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Groups of equal experts in a layer, each with two experts or more, ascending."""
        return groups_of(self.equal[self.layers.index(layer)])

    @property
    def groups_everywhere(self) -> tuple[tuple[int, ...], ...]:
        """Groups of experts that are equal in every layer, each with two experts or more, ascending."""
        everywhere: NDArray[np.bool_] = np.logical_and.reduce(self.equal)
        return groups_of(everywhere)

    @property
    def nearly_equal(self) -> tuple[tuple[int, int], ...]:
        """Pairs of experts that are not equal, but at most a tenth as far apart as the pair in the middle."""
        near = self.near
        return tuple(pair for pair, distance in self._unequal().items() if distance <= near)

    @property
    def near(self) -> float:
        """The largest mean distance of two experts that are nearly equal: a tenth of that of the pair in the middle."""
        distances = list(self._unequal().values())
        return _NEAR * float(np.median(distances)) if distances else 0.0

    def _unequal(self) -> dict[tuple[int, int], float]:
        """Mean distances of the pairs that are not equal."""
        means, everywhere = self.distances.mean(axis=0), np.logical_and.reduce(self.equal)
        return {pair: float(means[pair]) for pair in combinations(range(len(means)), 2) if not everywhere[pair]}


def groups_of(alike: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    """Groups of an equivalence (expert, expert), each with two experts or more, ascending."""
    groups = {tuple(int(other) for other in row.nonzero()[0]) for row in alike}
    return tuple(sorted(group for group in groups if len(group) > 1))


def measure_similarity(
    mixture: StoredMixture, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Similarity:
    """Compare the weights of all experts in each layer; every weight is read once, in blocks of rows.

    Args:
        mixture: the mixture.
        progress: called with the layers done and all there are.

    Raises:
        CheckpointError: a file ends too early.
    """
    layers = mixture.moe_layers
    shape = (len(layers), mixture.experts, mixture.experts)
    distances, equal = np.zeros(shape), np.ones(shape, bool)
    for place, layer in enumerate(layers):
        distances[place] = _distances(mixture, layer, equal[place])
        progress(place + 1, len(layers))
    return Similarity(layers, distances, equal)


def _distances(mixture: StoredMixture, layer: int, equal: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distances in a layer; `equal` (expert, expert) is cleared where two experts differ."""
    count = mixture.experts
    gram, squares = np.zeros((count, count)), np.zeros(count)
    for role in ROLES:
        for blocks in blocks_of([mixture.projection(layer, expert, role) for expert in range(count)]):
            clear_unequal(equal, blocks)
            # In float64: what is left of two nearly equal experts after the mean is taken away is small.
            numbers = np.stack([block.ravel() for block in blocks], dtype=np.float64)
            squares += np.square(numbers).sum(axis=1)
            numbers -= numbers.mean(axis=0)
            gram += numbers @ numbers.T
    for values in beside_projections(mixture, layer):
        equal &= np.array([[np.array_equal(one, other) for other in values] for one in values])
    return relative_distances(gram, squares)


def clear_unequal(equal: NDArray[np.bool_], blocks: Sequence[NDArray[np.float32]]) -> None:
    """Clear `equal` (expert, expert) where the same block of two experts' weights differs."""
    for one, other in np.argwhere(np.triu(equal, 1)):
        if not np.array_equal(blocks[one], blocks[other]):
            equal[one, other] = equal[other, one] = False


def beside_projections(mixture: StoredMixture, layer: int) -> Iterator[list[NDArray[np.float32]]]:
    """Whatever else a layer's experts compute with, such as biases and factors: the values of each, empty for none."""
    family, experts = mixture.family, range(mixture.experts)
    entries = mixture.by_expert(layer)
    for name in entries.keys() - {family.router, family.selection_bias, *family.experts}:
        yield list(read_values(entries[name]))
    own = [mixture.of_expert(layer, expert) for expert in experts]
    for name in {name for held in own for name in held} - set(family.experts):
        yield [read_values(held[name]) if name in held else np.empty(0, np.float32) for held in own]


def centred_products(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Products of vectors (vector, element) less their mean (vector, vector), and squared lengths of all (vector,).

    Those of vectors that are put together of parts are the sums of the parts' own; see `relative_distances`.
    """
    middle = vectors - vectors.mean(axis=0)
    return middle @ middle.T, np.square(vectors).sum(axis=1)


def relative_distances(gram: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances from the products of centred vectors (vector, vector), and the squared lengths of all (vector,)."""
    lengths = gram.diagonal()
    apart = np.maximum(lengths[:, None] + lengths - 2 * gram, 0)
    np.fill_diagonal(apart, 0)
    means = np.maximum((squares[:, None] + squares) / 2, np.finfo(np.float64).tiny)
    distances: NDArray[np.float64] = np.sqrt(apart / means)
    return distances
