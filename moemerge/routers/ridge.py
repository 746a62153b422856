"""Routers by ridge regression of the expert on the router input: balanced, centred, without a bias.

DUME (https://arxiv.org/abs/2603.29765) makes routers of merged experts so, with a bias, columns of length 1 and an
absolute lambda.
"""

import torch

from moemerge.routers.fitting import Labelled, fit_rows, gram_of
from moemerge.routers.request import LayerRows, RouterInputs, RouterRequest


def ridge_rows(inputs: RouterInputs, request: RouterRequest) -> LayerRows:
    """A layer's rows: `(G + lambda tr(G)/d I)^-1 Z' D (Y - 1/N)`, at the scale of held-out documents."""
    return fit_rows(inputs, request, solve)


def solve(data: Labelled) -> torch.Tensor:
    """Rows (expert, hidden), centred: one Cholesky factor in float64, of the smaller of the two systems that agree."""
    centred = data.targets - 1 / data.targets.shape[1]
    tokens, hidden = data.states.shape
    if tokens < hidden:
        root = data.weights.sqrt()[:, None]
        weighed = data.states * root
        system = (weighed @ weighed.T).double()
        system.diagonal().add_(data.regularisation * float(system.trace()) / hidden)
        inner = torch.cholesky_solve((centred * root).double(), torch.linalg.cholesky(system))
        rows = inner.float().T @ weighed
    else:
        system = gram_of(data.states, data.weights).double()
        system.diagonal().add_(data.regularisation * float(system.trace()) / hidden)
        moments = data.states.T @ (centred * data.weights[:, None])
        rows = torch.cholesky_solve(moments.double(), torch.linalg.cholesky(system)).float().T
    return rows - rows.mean(dim=0)
