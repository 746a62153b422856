"""Arithmetic on router rows that more than one way of making them needs."""

from typing import Final

import torch

_NOISE: Final = 1e-5


def contrast(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Router rows from mean vectors of what should and what should not reach each expert.

    Directions are compared, not lengths, and an expert without negative prompts is set against the mean of all
    positives: otherwise it would keep the direction that all text shares, and win every token. Rows are centred over
    the experts, which changes no choice of a softmax router and saves bfloat16 mantissa.

    Args:
        positive: (expert, hidden) mean over positive prompt tokens.
        negative: (expert, hidden) mean over negative prompt tokens; NaN rows for experts without any.

    Returns:
        (expert, hidden) rows with a mean length of 1.
    """
    positive, negative = unit(positive), unit(negative)
    missing = negative.isnan().any(dim=1, keepdim=True)
    rows: torch.Tensor = positive - torch.where(missing, positive.mean(dim=0), negative)
    rows = rows - rows.mean(dim=0)
    length = rows.norm(dim=1).mean()
    # What rounding leaves of equal directions says nothing, and must not be blown up.
    scaled: torch.Tensor = rows / length if length > _NOISE else torch.zeros_like(rows)
    return scaled


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., hidden) at length 1; zero stays zero."""
    scaled: torch.Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    return scaled


def top_weights(rows: torch.Tensor, states: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and indices (token, experts_per_token) of the experts that a Mixtral router with these rows chooses."""
    chosen = (states @ rows.T).topk(experts_per_token, dim=1)
    return chosen.values.softmax(dim=1), chosen.indices
