"""Which of several recipes go on to more text, and which are no worse than all others in both of two costs.

Successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943): all are tried on a little text, and
the best third of them on three times as much.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Final

FACTOR: Final = 3
"""How many times as much text a recipe is tried on that goes on, and of how many recipes one does."""
ROUNDS: Final = 4
"""How many sizes of text there are at most, of which the last is all of it."""
SHORTEST: Final = 64
"""Tokens of each domain that every recipe is tried on at least."""

Score = tuple[float, float]
"""The objective, and the cost; both are to be small."""


def first_windows(tokens: int, window: int) -> list[int]:
    """Lengths of a domain's first windows, so that each round but the last ends where a window does.

    Args:
        tokens: tokens that are read.
        window: the most tokens in a window.
    """
    lengths: list[int] = []
    for end in _ends(tokens)[:-1]:
        left = end - sum(lengths)
        if left >= SHORTEST:  # less is no round of its own
            count = math.ceil(left / window)
            lengths += [left // count + (place < left % count) for place in range(count)]
    return lengths


def growing(lengths: Sequence[int]) -> list[range]:
    """Divide the windows of a domain into rounds by their lengths: the numbers of those that are new in each.

    Each ends with the first window by which its part of the text is read.
    """
    until = list(accumulate(lengths))
    counts = [1 + bisect_left(until, end) for end in _ends(until[-1])]
    return [range(start, end) for start, end in pairwise([0, *counts])]


def _ends(tokens: int) -> list[int]:
    """Tokens of a domain that each round has read at its end."""
    parts = [math.ceil(tokens / FACTOR ** (ROUNDS - 1 - step)) for step in range(ROUNDS)]
    return [min(tokens, max(SHORTEST, part)) for part in parts]


def best_third(scores: Mapping[int, Score]) -> list[int]:
    """Choose the best third of some recipes by number, rounded up: first those that no other one beats in both."""
    chosen: list[int] = []
    left = dict(scores)
    while left:
        best = front(left)
        chosen += sorted(best, key=lambda number: (left[number], number))
        left = {number: score for number, score in left.items() if number not in best}
    return chosen[: math.ceil(len(scores) / FACTOR)]


def front(scores: Mapping[int, Score]) -> list[int]:
    """Find the recipes that none beats: no other is as good in both and better in one; by rising cost."""
    kept = [number for number in scores if not any(_beats(other, scores[number]) for other in scores.values())]
    return sorted(kept, key=lambda number: (scores[number][::-1], number))


def _beats(one: Score, other: Score) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def winner(scores: Mapping[int, Score]) -> int:
    """The recipe with the smallest objective; of equal ones the cheaper, then the earlier one."""
    return min(scores, key=lambda number: (scores[number], number))
