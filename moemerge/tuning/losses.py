"""What a step of tuning makes small: the formula stands in docs/tuning.md."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from moemerge.formats.family import Scoring
from moemerge.passes.tokens import Window
from moemerge.tuning.student import Student
from moemerge.tuning.teacher import Predictions

_LOAD: Final = 1e-3
_ANCHOR: Final = 1e-3


def text_loss(
    windows: Sequence[Window], logits: torch.Tensor, teachers: Sequence[Predictions | None], weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and cross-entropy in nats, summed over the tokens of each window that count: (window,) each.

    Args:
        windows: of text.
        logits: (window, position, vocab).
        teachers: of each window, its own expert's predictions, if there are any.
        weight: of the distillation.
    """
    losses, entropies = [], []
    for window, predicted, teacher in zip(windows, logits, teachers, strict=True):
        known = predicted[: len(window.ids)].float()
        ids = torch.tensor(window.ids, device=logits.device)
        counted = torch.tensor(window.scored, device=logits.device)
        entropy = torch.nn.functional.cross_entropy(known[:-1], ids[1:], reduction="none")[counted].sum()
        entropies.append(entropy.detach())
        if teacher and weight:
            entropy = entropy + weight * teacher.divergence(window, known)[counted].sum()
        losses.append(entropy)
    return torch.stack(losses), torch.stack(entropies)


def scores_of(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Shares (token, expert) that a router gives each expert before it chooses, from its logits."""
    if scoring == "softmax":
        return logits.softmax(dim=1)
    scores = logits.sigmoid()
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def load_loss(student: Student, counted: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """How far the experts' mean shares are from a prior (expert,): KL(prior || share), averaged over layers.

    Args:
        student: after a pass.
        counted: (window, position) which of its tokens count.
        prior: what share each expert has of the text.
    """
    terms = []
    for layer in student.gates:
        shares = scores_of(student.choices(layer)[counted.flatten()], student.mixture.family.scoring).mean(dim=0)
        present = prior.clone()
        present[student.absent[layer]] = 0
        present /= present.sum()
        terms.append(torch.special.xlogy(present, present / shares.clamp_min(1e-6)).sum())
    return _LOAD * torch.stack(terms).mean()


def anchor_loss(student: Student, start: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Squared distance of the gates from their start, relative to its own length, averaged over layers."""
    terms = [
        (gate - start[layer]).square().sum() / start[layer].square().sum().clamp_min(1e-12)
        for layer, gate in student.gates.items()
    ]
    return _ANCHOR * torch.stack(terms).mean()


def prior_of(experts: Sequence[int | None], count: int, device: torch.device) -> torch.Tensor:
    """The share (expert,) of the text that each expert is for; text of none belongs to all."""
    prior = torch.zeros(count, device=device)
    for expert in experts:
        if expert is None:
            prior += 1 / count
        else:
            prior[expert] += 1
    # An expert without text of its own keeps a little.
    return (prior + 1e-2) / (prior + 1e-2).sum()
