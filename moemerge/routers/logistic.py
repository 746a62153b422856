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


def solve(data: Labelled) -> torch.Tensor:
    """Fit rows (expert, hidden), centred over the experts."""
    hidden = data.states.shape[1]
    total = float(data.weights.sum())
    gram = gram_of(data.states, data.weights).div_(total)
    ridge = data.regularisation * float(gram.trace()) / hidden
    bound = (gram * _BOUND).double()
    bound.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(bound)
    rows = torch.zeros(data.targets.shape[1], hidden)
    for _ in range(_STEPS):
        misses = ((data.states @ rows.T).softmax(dim=1) - data.targets) * (data.weights / total)[:, None]
        slope = misses.T @ data.states + ridge * rows
        rows -= torch.cholesky_solve(slope.T.double(), factor).float().T
    return rows - rows.mean(dim=0)
