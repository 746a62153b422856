"""Router rows of kept experts that stand for others too: what the router gave all of them goes to the one kept."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from moemerge.editing.pruning.choice import Pruning
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.layer_tokens import LayerTokens, run_by_layer
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
    Of sigmoids that are divided by their sum the same is fitted, which small ones follow. Those that are not divided
    know no such constant: of their logits, that of the factor on the expert's output is taken away.

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
        own = self._pruning.own(layer)
        rows = self._mixture.runnable.read(self._mixture.router(layer)).float()
        present = ~tokens.logits.isneginf().any(dim=0)
        groups = [[expert for expert in members[one] if present[expert]] or [one] for one in kept]
        made = rows[own].clone()
        divisors = self._pruning.factors or [min(map(len, groups))] * len(groups)
        counts = torch.bincount(tokens.experts.flatten(), minlength=len(rows)).float()
        for place, group in enumerate(groups):
            if len(group) > 1:
                made[place] = row_of_group(rows, group, counts, tokens.states, divisors[place])
        self.changed |= not torch.equal(made, rows[own])
        self.rows[layer] = made.numpy()
        self._compare(tokens, own, made)

    def _compare(self, tokens: LayerTokens, own: Sequence[int], rows: torch.Tensor) -> None:
        before = torch.zeros_like(tokens.logits).scatter_(1, tokens.experts, tokens.weights)
        ffns = self._ffns(tokens.layer)
        expected = torch.stack([before[:, those].sum(dim=1) for those, _ in ffns], dim=1)
        given = (self._mixture.selection_bias(tokens.layer), self._mixture.weight_factors(tokens.layer))
        bias, factors = (None if values is None else values[own] for values in given)
        logits = tokens.states @ rows.T
        logits[tokens.logits[:, own].isneginf()] = -torch.inf
        for experts_per_token, misses in self.misses.items():
            weights, experts = choose(logits, experts_per_token, self._mixture.choosing, bias, factors)
            after = torch.zeros_like(logits).scatter_(1, experts, weights) * torch.tensor(self._pruning.factors or 1.0)
            found = torch.stack([after[:, places].sum(dim=1) for _, places in ffns], dim=1)
            misses.append(float((found - expected).abs().sum() / before.sum()) / 2)

    def _ffns(self, layer: int) -> list[tuple[list[int], list[int]]]:
        """The different FFNs that are kept: the experts before that each stands for, and its places after."""
        group_of = {expert: group for group in self._pruning.duplicates.get(layer, ()) for expert in group}
        found: dict[Sequence[int], tuple[list[int], list[int]]] = {}
        for place, (one, those) in enumerate(self._pruning.members[layer].items()):
            experts, places = found.setdefault(group_of.get(one, (one,)), ([], []))
            experts += those
            places.append(place)
        return list(found.values())


def row_of_group(
    rows: torch.Tensor, group: Sequence[int], counts: torch.Tensor, states: torch.Tensor, divisor: float
) -> torch.Tensor:
    """Fit the row (hidden) of one expert that stands for a group of equal ones.

    Args:
        rows: the router's rows (expert, hidden).
        group: the experts.
        counts: how many tokens choose each expert (expert,).
        states: router inputs (token, hidden).
        divisor: what the group's weight is divided by: the size of the layer's smallest group, whose constant all
            groups share, or the factor on the expert's output.
    """
    first, chosen = group[0], counts[list(group)] + 1
    mean = rows[first].clone()  # equal rows stay what they are
    for expert, share in zip(group[1:], (chosen / chosen.sum())[1:], strict=True):
        mean += share * (rows[expert] - rows[first])
    together = (states @ rows[list(group)].T).logsumexp(dim=1) - math.log(divisor)
    missing = together - states @ mean
    if float(missing.abs().max()) < _NEAR:
        return mean
    even = missing.mean() * even_direction(states)
    rest = missing - states @ even
    return mean + even + regress(states, rest[:, None], torch.ones(len(rest)), _PENALTY)[0]
