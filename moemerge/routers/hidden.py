"""Routers from the mean router input of the prompts: what the router itself will see, in the base model.

mergekit-moe's `hidden` averages the residual stream entering the layer at the prompts' last tokens; the router sees
the normed state that enters the FFN.
"""

from typing import Final

import torch

from moemerge.routers.request import RouterInputs, RouterRequest
from moemerge.routers.rows import contrast

# Rows of length 1 would mix the chosen experts almost equally, whatever the router knows.
TARGET_TOP_WEIGHT: Final = 0.9
_BISECTIONS: Final = 40


def hidden_rows(inputs: RouterInputs, request: RouterRequest) -> torch.Tensor:
    """A layer's rows (expert, hidden): contrast of mean router inputs, scaled to `TARGET_TOP_WEIGHT`."""
    experts = range(len(request.experts))
    made = contrast(
        torch.stack([inputs.mean(expert, positive=True) for expert in experts]).numpy(),
        torch.stack([inputs.mean(expert, positive=False) for expert in experts]).numpy(),
    )
    rows = torch.from_numpy(made)
    return rows * fit_scale(rows, inputs.states[inputs.positive], request.experts_per_token)


def fit_scale(rows: torch.Tensor, states: torch.Tensor, experts_per_token: int) -> float:
    """Factor on rows (expert, hidden) with which the first choice of states (token, hidden) has its target weight.

    With one expert per token the weight is 1 at any scale; the scale is then fitted as for two.
    """
    logits = (states @ rows.T).topk(max(experts_per_token, 2), dim=1).values
    low, high = 1e-4, 1e4
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if float((logits * middle).softmax(dim=1)[:, 0].mean()) < TARGET_TOP_WEIGHT:
            low = middle
        else:
            high = middle
    return high
