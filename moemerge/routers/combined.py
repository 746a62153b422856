"""Routers from all evidence: the experts' weights are a prior, which labelled tokens correct.

Without prompts and texts the prior alone makes the rows. With them, multinomial logistic regression begins at the
prior and is drawn towards it: the more tokens there are, the less the prior weighs. docs/routers.md has the
measurements.
"""

from functools import partial
from typing import Final

from moemerge.routers.fitting import fit_rows
from moemerge.routers.logistic import solve
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prior import neutral_states, prior_rows
from moemerge.routers.scaling import finish_rows
from moemerge.routers.scoring import fit_scale

# How sure the prior is of labelled tokens: the mean weight of the first of two chosen experts.
_PRIOR_WEIGHT: Final = 0.95


def combined_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows from the experts' weights, and from labelled tokens where there are some."""
    prior = prior_rows(inputs, request)
    labelled = inputs.states[inputs.routed]
    if len(labelled):
        start = prior * fit_scale(prior, labelled, 2, _PRIOR_WEIGHT)
        return fit_rows(inputs, request, partial(solve, start=start), calibrated=False)
    states = neutral_states(inputs)
    rows = prior * fit_scale(prior, states, request.mixture.experts_per_token)
    return LayerRows(finish_rows(rows, states, inputs, request))
