"""Experts that `moemerge prune` would leave out, by its own functions and the figures of an analysis."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from moemerge.analysis.figures import Analysis, Numbers, TextFigures
from moemerge.editing.pruning.choice import check_keep, keep_best, most_per_token
from moemerge.errors import RefusedError

SPARE: Final = 0.05
"""Share of weights times output lengths that the experts to spare have together at most."""


def without_text(text: TextFigures) -> tuple[int, ...]:
    """Experts that nothing can be said against: no text has their names, while some has those of other experts."""
    missing = tuple(number for number, name in enumerate(text.names) if name not in text.domains)
    return missing if len(missing) < len(text.names) else ()


def keep_without_copies(analysis: Analysis) -> int | None:
    """Find the smallest number of experts with which only copies of others go; None where prune allows none."""
    experts, equal, text = analysis.weights.experts, analysis.weights.equal, analysis.text
    mass = text.mass_share.mean(axis=0) if text else np.zeros(experts)
    group_of = {expert: group for group in equal for expert in group}
    for keep in _allowed(analysis, experts):
        kept = set(keep_best(np.zeros(experts), mass, equal, keep, analysis.choosing.groups))
        if all(kept & set(group_of.get(expert, (expert,))) for expert in range(experts)):
            return keep
    return None


def find_spare(analysis: Analysis, text: TextFigures, spoken_for: Sequence[int]) -> tuple[int, ...]:
    """Find the most experts without copies that prune would leave out and that have little together; maybe none.

    No more go than leave `experts_per_token` of them, and none of `spoken_for`.
    """
    experts, how = len(text.names), analysis.choosing
    scores, mass = _scores(text), text.mass_share.mean(axis=0)
    for keep in _allowed(analysis, experts):
        if most_per_token(analysis.experts_per_token, keep, how) < analysis.experts_per_token:
            continue
        dropped = sorted(set(range(experts)) - set(keep_best(scores, mass, (), keep, how.groups)))
        if mass[dropped].sum() <= SPARE and not set(dropped) & set(spoken_for):
            return tuple(dropped)
    return ()


def _scores(text: TextFigures) -> Numbers:
    """Means over layers of each expert's share of the saliency (expert,)."""
    sums = text.saliency.sum(axis=1, keepdims=True)
    scores: Numbers = (text.saliency / np.where(sums > 0, sums, 1)).mean(axis=0)
    return scores


def _allowed(analysis: Analysis, experts: int) -> Iterator[int]:
    for keep in range(1, experts):
        try:
            check_keep(keep, experts, analysis.choosing)
        except RefusedError:
            continue
        yield keep
