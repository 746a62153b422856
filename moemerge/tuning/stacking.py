"""A router's rows from the gates of single experts: standardised as in PHATGOOSE, under a scale of ours.

https://arxiv.org/abs/2402.05859, section 3.2.
"""

from typing import Final

import torch

from moemerge.evaluation.measuring import Texts
from moemerge.routers.scaling import calibrated_scale
from moemerge.routers.scoring import lowering
from moemerge.tuning.student import Student

# Of each expert, to fit the scale.
_SCALE_TOKENS: Final = 1024


def stack(student: Student, gates: dict[int, torch.Tensor], texts: Texts) -> dict[int, torch.Tensor]:
    """Rows (expert, hidden) by layer: standardised gates, at the scale that texts whose expert is known bear out.

    Args:
        student: the mixture, whose router inputs are taken as it is.
        gates: by layer (expert, hidden).
        texts: of every expert, to fit the scale to.
    """
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in gates}
    labels: list[int] = []
    with torch.no_grad():
        for domain, expert in enumerate(texts.expert):
            left = _SCALE_TOKENS
            for place in texts.of(domain) if expert is not None else ():
                window = texts.windows[place]
                if left <= 0:
                    break
                student.logits([window])
                counted = torch.tensor(window.counted)
                for layer, kept in states.items():
                    kept.append(student.inputs[layer].cpu()[counted])
                labels += [expert or 0] * int(counted.sum())
                left -= int(counted.sum())
    count = len(student.mixture.experts)
    targets = torch.nn.functional.one_hot(torch.tensor(labels), count).float()
    weights = (1 / targets.sum(dim=0).clamp_min(1))[labels]
    return {
        layer: _scaled(rows, torch.cat(states[layer]), targets, weights, student, layer)
        for layer, rows in gates.items()
    }


def _scaled(  # noqa: PLR0917
    gates: torch.Tensor, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, student: Student,
    layer: int,
) -> torch.Tensor:  # fmt: skip
    present = [expert for expert in range(len(gates)) if expert not in student.absent[layer]]
    rows = gates[present] - gates[present].mean(dim=1, keepdim=True)
    rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    mine = targets[:, present].sum(dim=1) > 0
    logits = states[mine] @ rows.T
    rows = rows * calibrated_scale(rows, states[mine], logits, targets[mine][:, present], weights[mine])
    rows = rows - rows.mean(dim=0)
    if student.mixture.family.scoring == "sigmoid":
        rows = rows - lowering(states)
    placed = torch.zeros_like(gates)
    placed[present] = rows
    return placed
