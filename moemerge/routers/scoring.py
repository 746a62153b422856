"""Weights of chosen experts by softmax or sigmoid, and the scale of rows that gives useful weights."""

from collections.abc import Callable
from typing import Final

import torch

from moemerge.families.choosing import Choosing
from moemerge.families.family import Scoring
from moemerge.routers.regression import regress

# Rows of length 1 would mix the chosen experts almost equally, whatever the router knows.
TARGET_WEIGHT: Final = 0.9
_SMALLEST, _LARGEST = 1e-4, 1e4
_BISECTIONS: Final = 40
# More would cost bfloat16 routers mantissa, lfm2_moe adds 1e-6 to the sum of the scores, and llama.cpp takes a sum
# below 6.1e-5, that of logits of -10, for 6.1e-5.
_LOWERED: Final = 7.0
# With this penalty a few prompts give a direction that is as even on other text; see docs/routers.md.
_EVEN_PENALTY: Final = 3.0
_STEPS: Final = 64
# No sharper without reason: float16 ends at 65504, and sigmoids near 1 tie.
_WORTHWHILE: Final = 1e-3
# transformers' own, so that scores of 0 have weights.
_TINY: Final = 1e-20


def top_weights(logits: torch.Tensor, experts_per_token: int, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by logits (token, expert); return weights and indices (token, experts_per_token)."""
    if scoring == "softmax":
        chosen = logits.topk(experts_per_token, dim=1)
        return chosen.values.softmax(dim=1), chosen.indices
    chosen = logits.sigmoid().topk(experts_per_token, dim=1)
    return chosen.values / (chosen.values.sum(dim=1, keepdim=True) + _TINY), chosen.indices


def choose(
    logits: torch.Tensor,
    experts_per_token: int,
    how: Choosing,
    bias: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by logits (token, expert) as a mixture's routers do.

    Args:
        logits: the router logits; minus infinity for an expert that is absent.
        experts_per_token: how many experts take each token.
        how: how the routers choose.
        bias: the selection bias (expert,), if the layer has one.
        factors: factors (expert,) on the weights of the chosen experts, if the layer has some.

    Returns:
        Weights and indices (token, experts_per_token), by falling weight.
    """
    scores = logits.softmax(dim=1) if how.scoring == "softmax" else logits.sigmoid()
    # The softmax of a logit that is far below the highest is 0, and would tie with others.
    ranked = logits if how.scoring == "softmax" and bias is None else scores + (0.0 if bias is None else bias)
    if how.groups > 1:
        best = ranked.reshape(len(ranked), how.groups, -1).topk(how.best_of_group, dim=2).values.sum(dim=2)
        chosen = torch.zeros_like(best).scatter(1, best.topk(how.chosen_groups, dim=1).indices, 1.0)
        inside = chosen.repeat_interleave(ranked.shape[1] // how.groups, dim=1)
        ranked = ranked.masked_fill(inside == 0, -torch.inf)
    experts = ranked.topk(experts_per_token, dim=1).indices
    weights = scores.gather(1, experts)
    if how.normalises:
        weights = weights / (weights.sum(dim=1, keepdim=True) + max(how.added, _TINY)).clamp_min(how.least)
    weights = weights * how.scale
    if factors is not None:
        weights = weights * factors[experts]
    weights, order = weights.sort(dim=1, descending=True, stable=True)
    return weights, experts.gather(1, order)


def widened(weights: torch.Tensor, experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Widen choices (token, choice) to `count` choices; those added have the weight 0."""
    added = count - experts.shape[1]
    return torch.nn.functional.pad(weights, (0, added)), torch.cat([experts, experts[:, :1].expand(-1, added)], dim=1)


def shares(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Compute the share (token, expert) that each expert has before the choice, from the logits."""
    if scoring == "softmax":
        return logits.softmax(dim=1)
    scores = logits.sigmoid()
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def log_scores(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Logarithms of the scores whose quotients are the weights, of logits of any shape."""
    return logits if scoring == "softmax" else torch.nn.functional.logsigmoid(logits)


def fit_scale(rows: torch.Tensor, states: torch.Tensor, experts_per_token: int, target: float = TARGET_WEIGHT) -> float:
    """Find the factor on rows (expert, hidden) at which the first choice has the mean weight `target`.

    The states (token, hidden) are weighed by a softmax, which lowered sigmoids equal. With one expert per token the
    weight is 1 at any scale; the scale is then fitted as for two.
    """
    count = min(max(experts_per_token, 2), len(rows))
    # (choice, token), since a softmax over a few neighbouring numbers takes 20 times as long.
    logits = (states @ rows.T).topk(count, dim=1).values.T.contiguous()
    low, high = _SMALLEST, _LARGEST
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if float((logits * middle).softmax(dim=0)[0].mean()) < target:
            low = middle
        else:
            high = middle
    return high


def even_direction(states: torch.Tensor) -> torch.Tensor:
    """Find a direction `c` (hidden) along which all text is about equally far: `c.z` is 1 for the mean of the states.

    It is the ridge regression of the number 1 on the states (token, hidden), and takes the place of a bias, which
    routers lack.
    """
    ones = torch.ones(len(states), 1)
    row = regress(states, ones, ones[:, 0], _EVEN_PENALTY)[0]
    return row / (states @ row).mean().clamp_min(torch.finfo(row.dtype).tiny)


def lowering(states: torch.Tensor) -> torch.Tensor:
    """Find the vector to subtract from every row so that sigmoids of states (token, hidden) grow like exponentials.

    It lowers the logits of all experts by about `_LOWERED`; divided by their sum, such sigmoids are a softmax. Without
    it, two large logits weigh one half each. The states must include those of first tokens, which are far from all
    others.
    """
    return _LOWERED * even_direction(states)


def nearest_scale(weight: Callable[[float], float]) -> float:
    """Find the scale at which a weight comes nearest its target, whether or not it grows with the scale."""
    low, high = _SMALLEST, _LARGEST
    best = low
    while high / low > 1 + _WORTHWHILE:
        step = (high / low) ** (1 / _STEPS)
        scales = [low * step**index for index in range(_STEPS + 1)]
        misses = [abs(weight(scale) - TARGET_WEIGHT) for scale in scales]
        nearest = min(misses)
        best = next(scale for scale, miss in zip(scales, misses, strict=True) if miss <= nearest + _WORTHWHILE)
        low, high = best / step, best * step
    return best
