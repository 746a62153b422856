"""Routers by ridge regression of the expert on the router input: balanced, centred, without a bias.

DUME (https://arxiv.org/abs/2603.29765) makes routers of merged experts by ridge regression too, with a bias, columns
of length 1 and an absolute lambda.
"""

import torch

from moemerge.routers.fitting import Fit, Labelled, fit_rows
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.regression import regress


def ridge_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows `(G + lambda tr(G)/d I)^-1 Z' D (Y - 1/N)`, at a scale calibrated on held-out documents."""
    return fit_rows(inputs, request, Fit("ridge", solve))


def solve(data: Labelled) -> torch.Tensor:
    """Fit rows (expert, hidden), centred over the experts."""
    centred = data.targets - 1 / data.targets.shape[1]
    rows = regress(data.states, centred, data.weights, data.regularisation)
    return rows - rows.mean(dim=0)
