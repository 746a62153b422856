"""Figures of what a layer's router chooses: load, experts chosen together, choice by token id, and by layer before."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.analysis.figures import Numbers

Ints = NDArray[np.int64]

_TINY: Final = float(np.finfo(np.float64).tiny)
_ROUNDED: Final = 1e-9
_ORDERS: Final = 64


@dataclass(frozen=True)
class LayerChoices:
    """The choices of a layer's router for all tokens."""

    ids: Ints
    """Token ids (token,)."""
    domain: Ints
    """Number of each token's domain (token,)."""
    experts: Ints
    """Chosen experts (token, choice), by falling weight."""
    weights: Numbers
    """Their weights (token, choice)."""
    present: NDArray[np.bool_]
    """Whether the layer has each expert (expert,)."""

    @property
    def chosen(self) -> Numbers:
        """1 for the experts that each token chooses, else 0 (token, expert)."""
        return self._spread(np.ones(self.experts.shape))

    @property
    def given(self) -> Numbers:
        """The weight that each token gives each expert (token, expert)."""
        return self._spread(self.weights)

    def _spread(self, values: Numbers) -> Numbers:
        spread = np.zeros((len(self.experts), len(self.present)))
        np.put_along_axis(spread, self.experts, values, axis=1)
        return spread

    @property
    def first(self) -> Ints:
        """Each token's expert with the largest weight (token,)."""
        return self.experts[:, 0]

    def load(self, domains: int) -> Numbers:
        """Share of each domain's tokens that choose each expert (domain, expert)."""
        chosen = self.chosen
        return np.stack([chosen[self.domain == domain].mean(axis=0) for domain in range(domains)])

    def weight(self) -> Numbers:
        """Mean weight of each expert where it is chosen (expert,); 0 where it never is."""
        mean: Numbers = self.given.sum(axis=0) / np.maximum(self.chosen.sum(axis=0), 1)
        return mean

    def choice_weight(self, most: int) -> Numbers:
        """Mean share of a token's weights that its largest, second and further ones have (choice,), without signs.

        Args:
            most: how many there are; NaN stands for those that the layer does not choose.
        """
        sizes = -np.sort(-np.abs(self.weights), axis=1)
        shares = (sizes / np.maximum(sizes.sum(axis=1, keepdims=True), _TINY)).mean(axis=0)
        return np.pad(shares, (0, most - len(shares)), constant_values=np.nan)

    def together(self) -> Numbers:
        """Share of tokens that choose both of two experts (expert, expert)."""
        chosen = self.chosen
        share: Numbers = chosen.T @ chosen / len(chosen)
        return share

    def entropy(self) -> float:
        """Entropy of the experts' shares of all choices, divided by that of equal shares; 0 with one expert."""
        present = int(self.present.sum())
        counts = self.chosen.sum(axis=0)
        return _entropy(counts) / float(np.log(present)) if present > 1 else 0.0

    def by_token(self) -> tuple[float, float]:
        """Shares of tokens whose first expert is known by their id, and by being first most often.

        See `TextFigures.by_token` and `TextFigures.by_majority`. NaN where no id occurs twice.
        """
        _, ids, occurrences = np.unique(self.ids, return_inverse=True, return_counts=True)
        again = occurrences[ids] > 1
        if not again.any():
            return np.nan, np.nan
        counts = np.zeros((len(occurrences), len(self.present)), np.int64)
        np.add.at(counts, (ids, self.first), 1)
        others, own = counts[ids], self.first[:, None]
        mine = np.take_along_axis(others, own, axis=1)[:, 0] - 1
        np.put_along_axis(others, own, -1, axis=1)
        return float((mine > others.max(axis=1))[again].mean()), float(
            np.bincount(self.first[again]).max() / again.sum()
        )


def agreement(one: Ints, other: Ints) -> float:
    """How far two layers' first choices (token,) tell each other: from 0, no more than by chance, to 1.

    It is their mutual information, divided by the smaller entropy. Of few tokens, or many experts, choices that have
    nothing to do with each other have mutual information too: its mean over some random orders of one layer's choices
    is taken from both, and what is below 0 is 0. See "Information Theoretic Measures for Clusterings Comparison"
    (https://jmlr.org/papers/v11/vinh10a.html), which calls it adjusted mutual information.

    NaN where a layer's choices are all the same, or every order tells as much.
    """
    random = np.random.default_rng(0)
    expected = float(np.mean([_mutual_information(one, random.permutation(other)) for _ in range(_ORDERS)]))
    most = min(_entropy(np.bincount(choices)) for choices in (one, other)) - expected
    return max(_mutual_information(one, other) - expected, 0.0) / most if most > _ROUNDED else np.nan


def _mutual_information(one: Ints, other: Ints) -> float:
    """Mutual information in nats of two series of numbers (token,), as if their shares were all that there is."""
    pairs = one * (int(other.max()) + 1) + other
    return _entropy(np.bincount(one)) + _entropy(np.bincount(other)) - _entropy(np.bincount(pairs))


def _entropy(counts: Numbers | Ints) -> float:
    """Entropy in nats of shares that are as large as counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
