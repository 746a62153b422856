"""Scale and finish router rows, by whatever method they were found."""

import math
from typing import Final

import torch

from moemerge.routers.pass_inputs import PassRequest, RouterInputs
from moemerge.routers.scoring import even_direction, fit_scale, lowering

# On text that separates experts perfectly, no scale would be sharp enough; and a router that is certain of everything
# is also certain of text that it has never seen.
SHARPEST: Final = 0.99
_LOW, _HIGH = 1e-4, 1e4
_BISECTIONS = 50
_BALANCINGS = 200


def calibrated_scale(
    rows: torch.Tensor, states: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> float:
    """Find the factor on rows at which logits of held-out tokens have the smallest cross-entropy to their targets.

    The cross-entropy is convex in the factor, so bisection by the sign of its slope finds the minimum.

    Args:
        rows: (expert, hidden).
        states: (token, hidden), which limit the sharpest scale.
        logits: (token, expert), by rows that were made without the token's document.
        targets: (token, expert), summing to 1.
        weights: (token,).
    """
    low, high = _LOW, _HIGH
    wanted = (targets * logits).sum(dim=1)
    by_expert = logits.T.contiguous()  # whose softmax takes a twentieth of the time
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        slope = (weights * (((by_expert * middle).softmax(dim=0) * by_expert).sum(dim=0) - wanted)).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return min(low, fit_scale(rows, states, 2, SHARPEST))


def finish_rows(rows: torch.Tensor, states: torch.Tensor, inputs: RouterInputs, request: PassRequest) -> torch.Tensor:
    """Complete scaled rows of the present experts to rows (expert, hidden) as they are stored, centred.

    Args:
        rows: (present expert, hidden).
        states: (token, hidden), the router inputs that the rows are for.
        inputs: the layer's router inputs.
        request: the request of the pass.
    """
    present = request.present(inputs.layer)
    rows = rows * request.settings.scale
    if request.settings.load_prior:
        rows = _with_prior(rows, inputs.states[inputs.unsorted] if inputs.unsorted.any() else states, request, present)
    rows = rows - rows.mean(dim=0)
    if request.scoring == "sigmoid":
        absent = request.absent(inputs.layer)
        first = inputs.beginnings[torch.tensor([prompt.expert not in absent for prompt in inputs.prompts])]
        rows = rows - lowering(torch.cat([states, first]))
    placed = torch.zeros(len(request.mixture.expert_widths), rows.shape[1])
    placed[present] = rows
    return placed


def _with_prior(rows: torch.Tensor, states: torch.Tensor, request: PassRequest, present: list[int]) -> torch.Tensor:
    """Shift rows so that experts take their shares of the states: by a bias for each, along an even direction."""
    wanted = torch.tensor([request.settings.load_prior[expert] for expert in present])  # type: ignore[index]
    wanted /= wanted.sum()
    logits = states @ rows.T
    bias = torch.zeros(len(present))
    for _ in range(_BALANCINGS):
        # In logarithms: with sharp rows, the mean weight of an expert that no state is like is 0 in float32.
        loads = (logits + bias).log_softmax(dim=1).logsumexp(dim=0) - math.log(len(states))
        bias += wanted.log() - loads
    return rows + bias[:, None] * even_direction(states)
