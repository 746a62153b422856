"""Router rows of kept experts that stand for others too: what the router gave all of them goes to the one kept."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from moemerge.editing.pruning.choice import Pruning
from moemerge.editing.pruning.saliency import LayerTokens, run_by_layer
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.compute_dtype import Compute
from moemerge.routers.regression import regress
from moemerge.routers.scoring import choose, even_direction

# As for the direction that takes the place of a bias; see `routers.scoring.even_direction`.
_PENALTY: Final = 3.0
# Logits that are so near need no other rows, which would only be rounded once more.
_NEAR: Final = 1e-4


@dataclass(frozen=True)
class GroupRows:
    """Router rows of a pruned mixture, and how near its weights come to those of the whole one."""

    rows: Mapping[int, NDArray[np.float32]]
    """Rows (kept expert, hidden) of each layer with a router; empty where all stay as they are."""
    misses: Mapping[int, float]
    """By the number of experts per token, the share of its weights that a token gives to other FFNs than before: 0
    where the pruned mixture computes what the whole one does; the mean over tokens and layers."""


def fit_rows(
    mixture: MixtureModel,
    texts: Texts,
    compute: Compute,
    pruning: Pruning,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> GroupRows:
    """Fit the rows of kept experts that stand for several, on the mixture's own logits.

    A softmax gives experts `e` with equal FFNs together the weight of `log(sum exp(logit of e))`. Where all groups have
    one size and the rows within each are equal, that is their logit and a constant, and rows stay as they are. Else
    the difference to the members' mean row is fitted: its mean along an even direction, the rest by ridge regression.

    Args:
        mixture: the whole mixture.
        texts: windows of text to fit on.
        compute: the device and dtype to run in.
        pruning: what is kept.
        progress: called with the layers done and all there are.
    """
    fitter = _Fitter(mixture, pruning)
    run_by_layer(mixture, texts, compute, fitter.add, progress)
    misses = {count: float(np.mean(found)) for count, found in fitter.misses.items()}
    return GroupRows(fitter.rows if fitter.changed else {}, misses)


class _Fitter:
    """Fits a layer's rows as soon as all its tokens are there."""

    def __init__(self, mixture: MixtureModel, pruning: Pruning) -> None:
        self._mixture, self._pruning = mixture, pruning
        self.rows: dict[int, NDArray[np.float32]] = {}
        self.changed = False
        self.misses: dict[int, list[float]] = {count: [] for count in range(1, pruning.experts_per_token + 1)}

    def add(self, tokens: LayerTokens) -> None:
        layer = tokens.layer
        kept, members = self._pruning.kept[layer], self._pruning.members[layer]
        rows = self._mixture.runnable.read(self._mixture.router(layer)).float()
        present = ~tokens.logits.isneginf().any(dim=0)
        groups = [[expert for expert in members[one] if present[expert]] or [one] for one in kept]
        made = rows[list(kept)].clone()
        fewest = min(map(len, groups))
        counts = torch.bincount(tokens.experts.flatten(), minlength=len(rows)).float()
        for place, group in enumerate(groups):
            if len(group) > 1:
                made[place] = row_of_group(rows, group, counts, tokens.states, fewest)
        self.changed |= not torch.equal(made, rows[list(kept)])
        self.rows[layer] = made.numpy()
        self._compare(tokens, kept, members, made)

    def _compare(
        self, tokens: LayerTokens, kept: Sequence[int], members: Mapping[int, Sequence[int]], rows: torch.Tensor
    ) -> None:
        count = tokens.logits.shape[1]
        before = torch.zeros(len(tokens.weights), count).scatter_(1, tokens.experts, tokens.weights)
        expected = torch.stack([before[:, list(members[one])].sum(dim=1) for one in kept], dim=1)
        given = (self._mixture.selection_bias(tokens.layer), self._mixture.weight_factors(tokens.layer))
        bias, factors = (None if values is None else values[list(kept)] for values in given)
        logits = tokens.states @ rows.T
        logits[tokens.logits[:, list(kept)].isneginf()] = -torch.inf
        for experts_per_token, misses in self.misses.items():
            weights, experts = choose(logits, experts_per_token, self._mixture.choosing, bias, factors)
            found = torch.zeros_like(expected).scatter_(1, experts, weights)
            misses.append(float((found - expected).abs().sum(dim=1).mean()) / 2)


def row_of_group(
    rows: torch.Tensor, group: Sequence[int], counts: torch.Tensor, states: torch.Tensor, fewest: int
) -> torch.Tensor:
    """Fit the row (hidden) of one expert that stands for a group of equal ones.

    Args:
        rows: the router's rows (expert, hidden).
        group: the experts.
        counts: how many tokens choose each expert (expert,).
        states: router inputs (token, hidden).
        fewest: the size of the smallest group of the layer, whose constant all groups share.
    """
    first, chosen = group[0], counts[list(group)] + 1
    mean = rows[first].clone()  # equal rows stay what they are
    for expert, share in zip(group[1:], (chosen / chosen.sum())[1:], strict=True):
        mean += share * (rows[expert] - rows[first])
    together = (states @ rows[list(group)].T).logsumexp(dim=1) - math.log(fewest)
    missing = together - states @ mean
    if float(missing.abs().max()) < _NEAR:
        return mean
    even = missing.mean() * even_direction(states)
    rest = missing - states @ even
    return mean + even + regress(states, rest[:, None], torch.ones(len(rest)), _PENALTY)[0]
