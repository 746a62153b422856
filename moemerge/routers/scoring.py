"""How a router of a family weighs the experts that it chooses, and how sharply it should."""

from collections.abc import Callable
from typing import Final

import torch

from moemerge.families.family import Scoring
from moemerge.routers.regression import regress

# Rows of length 1 would mix the chosen experts almost equally, whatever the router knows.
TARGET_WEIGHT: Final = 0.9
_SMALLEST, _LARGEST = 1e-4, 1e4
_BISECTIONS: Final = 40
# More would cost bfloat16 routers mantissa, lfm2_moe adds 1e-6 to the sum of the scores, and llama.cpp takes a sum
# below 6.1e-5, that of logits of -10, for 6.1e-5.
_LOWERED: Final = 7.0
# With as much, a few prompts are enough for a direction that is as even on other text; see docs/routers.md.
_EVEN_PENALTY: Final = 3.0
_STEPS: Final = 64
# A sharper router has to earn it: float16 ends at 65504, and sigmoids near 1 tie.
_WORTHWHILE: Final = 1e-3
# transformers' own, so that scores of 0 have weights.
_TINY: Final = 1e-20


def top_weights(logits: torch.Tensor, experts_per_token: int, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and indices (token, experts_per_token) of the experts that logits (token, expert) choose."""
    if scoring == "softmax":
        chosen = logits.topk(experts_per_token, dim=1)
        return chosen.values.softmax(dim=1), chosen.indices
    chosen = logits.sigmoid().topk(experts_per_token, dim=1)
    return chosen.values / (chosen.values.sum(dim=1, keepdim=True) + _TINY), chosen.indices


def shares(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """What share (token, expert) a router gives each expert before it chooses, from its logits."""
    if scoring == "softmax":
        return logits.softmax(dim=1)
    scores = logits.sigmoid()
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def fit_scale(rows: torch.Tensor, states: torch.Tensor, experts_per_token: int, target: float = TARGET_WEIGHT) -> float:
    """Factor on rows (expert, hidden) with which the first choice of states (token, hidden) has this mean weight.

    Of a softmax, that is, and of sigmoids that were lowered. With one expert per token the weight is 1 at any scale;
    the scale is then fitted as for two.
    """
    count = min(max(experts_per_token, 2), len(rows))
    logits = (states @ rows.T).topk(count, dim=1).values
    low, high = _SMALLEST, _LARGEST
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if float((logits * middle).softmax(dim=1)[:, 0].mean()) < target:
            low = middle
        else:
            high = middle
    return high


def even_direction(states: torch.Tensor) -> torch.Tensor:
    """The direction `c` (hidden) along which all text is about equally far: `c.z` is 1 for the mean of the states.

    It is the ridge regression of the number 1 on the states (token, hidden), and takes the place of a bias, which no
    router has.
    """
    ones = torch.ones(len(states), 1)
    row = regress(states, ones, ones[:, 0], _EVEN_PENALTY)[0]
    return row / (states @ row).mean().clamp_min(torch.finfo(row.dtype).tiny)


def lowering(states: torch.Tensor) -> torch.Tensor:
    """What to take from every row so that the sigmoids of states (token, hidden) grow as exponentials do.

    The logits of all experts become lower by about `_LOWERED`: divided by their sum, such sigmoids are a softmax. As
    they are, both of two large logits weigh one half. Among the states have to be those of first tokens, which are far
    from all others.
    """
    return _LOWERED * even_direction(states)


def nearest_scale(weight: Callable[[float], float]) -> float:
    """The scale with which a weight comes as near its target as it can, whether it grows with the scale or not."""
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
