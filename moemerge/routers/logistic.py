"""Routers by multinomial logistic regression, without step sizes to choose.

The Hessian of the loss is nowhere larger than `(I - 1/N) / 2 (x) G` (Boehning 1992, Annals of the Institute of
Statistical Mathematics 44), so that one Cholesky factor serves every Newton-like step, and the loss falls in each.
"""

from typing import Final

import torch

from moemerge.routers.fitting import Labelled, fit_rows
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.regression import gram_of

# Stopped early: more steps sharpen rows in ways that do not help on held-out documents.
_STEPS: Final = 20
_BOUND: Final = 0.5


def logistic_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows, at a scale that is calibrated on held-out documents."""
    return fit_rows(inputs, request, solve)


def solve(data: Labelled, start: torch.Tensor | None = None) -> torch.Tensor:
    """Fit rows (expert, hidden), centred over the experts.

    Args:
        data: the tokens and their experts.
        start: rows (expert, hidden) to begin with, and to be drawn towards; zeros without it. Where the tokens say
            otherwise it may be far from the solution, so that the steps are then accelerated (Nesterov's momentum,
            as in Beck and Teboulle 2009, SIAM Journal on Imaging Sciences 2).
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
    offset = 0 if start is None else data.states @ start.T
    change = torch.zeros(data.targets.shape[1], states.shape[1])
    ahead = change
    for step in range(_STEPS):
        misses = ((offset + states @ ahead.T).softmax(dim=1) - data.targets) * (data.weights / total)[:, None]
        slope = misses.T @ states + ridge * ahead
        before, change = change, ahead - torch.cholesky_solve(slope.T.double(), factor).float().T
        ahead = change if start is None else change + step / (step + 3) * (change - before)
    rows = change if basis is None else change @ basis.T
    rows = rows if start is None else start + rows
    return rows - rows.mean(dim=0)
