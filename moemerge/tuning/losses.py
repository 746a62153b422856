"""The losses that a step of tuning minimises; docs/tuning.md has the formula."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from moemerge.evaluation.losses import token_losses
from moemerge.passes.tokens import Window
from moemerge.routers.scoring import shares
from moemerge.tuning.student import Student
from moemerge.tuning.teachers import Predictions

_LOAD: Final = 1e-3
_ANCHOR: Final = 1e-3


def cross_entropy(windows: Sequence[Window], logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats over each window's scored tokens: (window,), from logits (window, position, vocab)."""
    losses = [
        token_losses(window, found[: len(window.ids)].float()).sum()
        for window, found in zip(windows, logits, strict=True)
    ]
    return torch.stack(losses)


def distillation_loss(windows: Sequence[Window], logits: torch.Tensor, teachers: Sequence[Predictions]) -> torch.Tensor:
    """KL(teacher || mixture) in nats, summed over each window's tokens that are scored: (window,).

    Args:
        windows: the windows of text.
        logits: the mixture's logits (window, position, vocab).
        teachers: for each window, its own expert's predictions.
    """
    losses = []
    for window, found, teacher in zip(windows, logits, teachers, strict=True):
        scored = torch.tensor(window.scored, device=logits.device)
        losses.append(teacher.divergence(window, found[: len(window.ids)].float())[scored].sum())
    return torch.stack(losses)


def load_loss(student: Student, counted: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Compare the experts' mean shares with a prior (expert,): KL(prior || share), averaged over layers.

    Args:
        student: the student after a pass.
        counted: which tokens of the pass count (window, position).
        prior: the share of that text that each expert is to have.
    """
    terms = []
    for layer in student.gates:
        logits = student.router_logits(layer)[counted.flatten()]
        found = shares(logits, student.mixture.family.scoring).mean(dim=0)
        present = prior.clone()
        present[student.absent[layer]] = 0
        present /= present.sum()
        terms.append(torch.special.xlogy(present, present / found.clamp_min(1e-6)).sum())
    return _LOAD * torch.stack(terms).mean()


def anchor_loss(student: Student, start: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Squared distance of the gates from their start, relative to the start's squared length, averaged over layers.

    Args:
        student: the model that is trained.
        start: the trained tensors at the start, by name.
    """
    terms = []
    for layer, gate in student.gates.items():
        first = start[student.mixture.router(layer)]
        terms.append((gate - first).square().sum() / first.square().sum().clamp_min(1e-12))
    return _ANCHOR * torch.stack(terms).mean()


def prior_of(texts: Sequence[tuple[int | None, int]], count: int, device: torch.device) -> torch.Tensor:
    """Compute the share (expert,) of some text that each expert is for, from pairs of an expert and its tokens.

    Text of no expert belongs to all alike; an expert without text keeps a little.
    """
    prior = torch.full((count,), 1e-2, device=device)
    total = sum(tokens for _, tokens in texts)
    for expert, tokens in texts:
        if expert is None:
            prior += tokens / total / count
        else:
            prior[expert] += tokens / total
    return prior / prior.sum()
