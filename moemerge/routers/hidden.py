"""Routers from the mean router input of the prompts in the base model.

mergekit-moe's `hidden` averages the residual stream entering the layer at the prompts' last tokens; the router sees
the state that enters the FFN.
"""

import torch

from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prompts import SHARED
from moemerge.routers.rows import contrast, unit
from moemerge.routers.scaling import finish_rows
from moemerge.routers.scoring import fit_scale, nearest_scale


def hidden_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows: contrast of mean router inputs, scaled."""
    experts, present = range(len(request.mixture.expert_widths)), request.present(inputs.layer)
    made = contrast(
        torch.stack([inputs.mean(expert, positive=True) for expert in experts]).numpy(),
        torch.stack([inputs.mean(expert, positive=False) for expert in experts]).numpy(),
        request.absent(inputs.layer),
    )
    rows = torch.from_numpy(made)[present]
    states = inputs.states[inputs.routed & torch.isin(inputs.expert, torch.tensor(present))]
    rows *= fit_scale(rows, states, request.mixture.experts_per_token)
    return LayerRows(finish_rows(rows, states, inputs, request))


def shared_gate_row(inputs: RouterInputs) -> torch.Tensor:
    """Make a layer's gate (1, hidden) of the shared experts: contrast of their prompts with other text, scaled.

    The other text is their negative prompts; without any, the positive prompts of the routed experts; without these,
    all other text.
    """
    positive = inputs.states[inputs.positive & (inputs.expert == SHARED)]
    negative = inputs.mean(SHARED, positive=False)
    if negative.isnan().any():
        others = inputs.routed if inputs.routed.any() else inputs.expert != SHARED
        negative = inputs.states[others].mean(dim=0)
    towards, away = unit(torch.stack([positive.mean(dim=0), negative]).numpy())
    row = torch.from_numpy(unit((towards - away)[None]))
    logits = positive @ row.T
    return row * nearest_scale(lambda scale: float((logits * scale).sigmoid().mean()))
