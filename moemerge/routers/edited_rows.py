"""Kept router rows in an edited mixture: two routers in one, dropped experts.

All functions work on the router inputs or logits of one layer. Logits are those of experts that are present there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moemerge.families.family import Scoring
from moemerge.routers.added_rows import KeptRows
from moemerge.routers.fitting import Labelled
from moemerge.routers.logistic import descend
from moemerge.routers.scoring import log_scores, top_weights


def part_offset(first: KeptRows, second: KeptRows, data: Labelled) -> torch.Tensor:
    """Fit the row (hidden,) to add to each row of a second router, so that tokens are divided rightly between the two.

    Within each part the rows stay commensurate: what is chosen there, and how it is mixed, does not change.

    Args:
        first: rows of the first mixture's router.
        second: rows of the second mixture's router.
        data: tokens with the shares (token, 2) that the experts of each mixture should take of them together.
    """
    first_score, logits = first.log_score(data.states), data.states @ second.rows.T

    def misses(moved: torch.Tensor) -> torch.Tensor:
        scores = log_scores(logits + moved, second.scoring)
        share = torch.sigmoid(scores.logsumexp(dim=1) - first_score)
        slope = (share - data.targets[:, 1])[:, None]
        if second.scoring == "softmax":
            return slope
        return slope * (scores.softmax(dim=1) * torch.sigmoid(-logits - moved)).sum(dim=1, keepdim=True)

    return descend(data, misses, 1, accelerated=True)[0]


@dataclass(frozen=True)
class Redistribution:
    """Where the weight of dropped experts goes in one layer."""

    tokens: float
    """Share of all tokens that chose a dropped expert."""
    weight: float
    """Mean weight of dropped experts on these tokens."""
    gains: tuple[float, ...]
    """Share of that weight that each kept expert gains, in ascending order of the old numbers; together 1."""


def redistribution(
    logits: torch.Tensor, dropped: Sequence[int], experts_per_token: int, scoring: Scoring
) -> Redistribution:
    """Measure where the weight of dropped experts goes if the rows of the others stay as they are.

    Args:
        logits: (token, expert) of any text.
        dropped: numbers of the experts that are dropped.
        experts_per_token: experts per token, before and, where so many are kept, after.
        scoring: how the router weighs.
    """
    kept = [expert for expert in range(logits.shape[1]) if expert not in dropped]
    before = _weights(logits, experts_per_token, scoring)
    lost = before[:, list(dropped)].sum(dim=1)
    after = _weights(logits[:, kept], min(experts_per_token, len(kept)), scoring)
    whole = float(lost.sum())
    gains = (after - before[:, kept])[lost > 0].sum(dim=0) / whole if whole else torch.zeros(len(kept))
    share = float((lost > 0).float().mean())
    return Redistribution(share, whole / (share * len(logits)) if whole else 0.0, tuple(gains.tolist()))


def _weights(logits: torch.Tensor, experts_per_token: int, scoring: Scoring) -> torch.Tensor:
    """Weights (token, expert), 0 where an expert is not chosen."""
    weights, chosen = top_weights(logits, experts_per_token, scoring)
    return torch.zeros_like(logits).scatter_(1, chosen, weights)
