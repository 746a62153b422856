"""Routers from all evidence: the experts' weights are a prior, which labelled tokens correct.

Without prompts and texts the prior alone makes the rows. With them, multinomial logistic regression begins at the
prior and is drawn towards it: the more tokens there are, the less the prior weighs. docs/routers.md has the
measurements.
"""

from functools import partial
from typing import Final

import torch

from moemerge.routers.fitting import Fit, Labelled, fit_rows
from moemerge.routers.logistic import solve
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prior import neutral_states, prior_rows
from moemerge.routers.scaling import finish_rows
from moemerge.routers.scoring import fit_scale

# How sure the prior is of labelled tokens: the mean weight of the first of two chosen experts.
PRIOR_WEIGHT: Final = 0.95
# Correlation of the prior's logits with labels from which on the prior counts in full; it measured 0.3 to 0.8 where
# the prior helps, and -0.4 where it is wrong.
_FULL_AGREEMENT: Final = 0.2


def combined_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows from the experts' weights, and from labelled tokens where there are some."""
    prior = prior_rows(inputs, request)
    if inputs.routed.any():
        fit = Fit("combined", partial(_correct, prior), (prior,))
        return fit_rows(inputs, request, fit, calibrated=False)
    states = neutral_states(inputs)
    rows = prior * fit_scale(prior, states, request.mixture.experts_per_token)
    return LayerRows(finish_rows(rows, states, inputs, request))


def _correct(prior: torch.Tensor, data: Labelled) -> torch.Tensor:
    """Fit rows (expert, hidden) to labelled tokens, beginning at the prior as far as it agrees with these."""
    return solve(data, prior * (trust_in(prior, data) * fit_scale(prior, data.states, 2, PRIOR_WEIGHT)))


def trust_in(prior: torch.Tensor, data: Labelled) -> float:
    """How far a prior (expert, hidden) counts beside labelled tokens, from 0 to 1: as far as it agrees with them."""
    return min(1.0, max(0.0, _agreement(prior, data)) / _FULL_AGREEMENT)


def _agreement(prior: torch.Tensor, data: Labelled) -> float:
    """Correlation of the prior's logits with the targets, both centred over the experts; 0 without a prior."""
    logits = data.states @ prior.T
    logits -= logits.mean(dim=1, keepdim=True)
    targets = data.targets - 1 / data.targets.shape[1]
    both, own, theirs = (
        float((data.weights[:, None] * a * b).sum())
        for a, b in ((logits, targets), (logits, logits), (targets, targets))
    )
    return both / (own * theirs) ** 0.5 if own * theirs > 0 else 0.0
