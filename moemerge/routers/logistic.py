"""Routers by multinomial logistic regression, without step sizes to choose.

The Hessian of the loss is nowhere larger than `(I - 1/N) / 2 (x) G` (Boehning 1992, Annals of the Institute of
Statistical Mathematics 44), so that one Cholesky factor serves every Newton-like step, and the loss falls in each.
"""

from collections.abc import Callable
from typing import Final

import torch

from moemerge.routers.fitting import Fit, Labelled, fit_rows
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.regression import gram_of

# Stopped early: more steps sharpen rows in ways that do not help on held-out documents.
_STEPS: Final = 20
_BOUND: Final = 0.5


def logistic_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows, at a scale that is calibrated on held-out documents."""
    return fit_rows(inputs, request, Fit("logistic", solve))


def solve(data: Labelled, start: torch.Tensor | None = None) -> torch.Tensor:
    """Fit rows (expert, hidden), centred over the experts.

    Args:
        data: the tokens and their experts.
        start: rows (expert, hidden) to begin with, and to be drawn towards; zeros without it. Where the tokens say
            otherwise it may be far from the solution, so that the steps are then accelerated (Nesterov's momentum,
            as in Beck and Teboulle 2009, SIAM Journal on Imaging Sciences 2).
    """
    offset = 0 if start is None else data.states @ start.T

    def misses(moved: torch.Tensor) -> torch.Tensor:
        return (offset + moved).softmax(dim=1) - data.targets

    change = descend(data, misses, data.targets.shape[1], accelerated=start is not None)
    rows = change if start is None else start + change
    return rows - rows.mean(dim=0)


def descend(
    data: Labelled, misses: Callable[[torch.Tensor], torch.Tensor], count: int, *, accelerated: bool
) -> torch.Tensor:
    """Find the change of rows (row, hidden) from where they are that makes a loss small, drawn towards no change.

    Args:
        data: the tokens, their weights and the regularisation.
        misses: a function from what the change adds to the rows' logits (token, row) to the slope (token, row) of each
            token's loss by these; the loss may nowhere bend more than half a square.
        count: how many rows there are.
        accelerated: whether steps are accelerated, for rows that may be far from the solution.
    """
    hidden = data.states.shape[1]
    total = float(data.weights.sum())
    # A change of rows lies in the span of the states; of few tokens, a basis of it makes the system smaller.
    basis, states = None, data.states
    if len(states) < hidden:
        basis, triangle = torch.linalg.qr(states.T)
        states = triangle.T
    gram = gram_of(states, data.weights).div_(total)
    ridge = data.regularisation * float(gram.trace()) / hidden
    bound = (gram * _BOUND).double()
    bound.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(bound)
    change = torch.zeros(count, states.shape[1])
    ahead = change
    for step in range(_STEPS):
        slope = (misses(states @ ahead.T) * (data.weights / total)[:, None]).T @ states + ridge * ahead
        before, change = change, ahead - torch.cholesky_solve(slope.T.double(), factor).float().T
        ahead = change + step / (step + 3) * (change - before) if accelerated else change
    return change if basis is None else change @ basis.T
