"""Ridge regression on router inputs, in closed form."""

from typing import Final

import torch

_CHUNK_TOKENS: Final = 4096


def gram_of(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum `weight z z'` over tokens to a matrix (hidden, hidden) in float32, a chunk of tokens at a time."""
    gram = torch.zeros(states.shape[1], states.shape[1])
    for first in range(0, len(states), _CHUNK_TOKENS):
        chunk = slice(first, first + _CHUNK_TOKENS)
        weighed = states[chunk] * weights[chunk].sqrt()[:, None]
        gram.addmm_(weighed.T, weighed)
    return gram


def regress(states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, penalty: float) -> torch.Tensor:
    """Fit rows (target, hidden) whose products with the states come nearest the targets, without a bias.

    This takes one Cholesky factor in float64, of the primal or the dual system, whichever is smaller.

    Args:
        states: (token, hidden).
        targets: (token, target).
        weights: (token,), factors on the squared errors.
        penalty: factor on the squared length of a row, relative to the mean variance of the states' components.
    """
    tokens, hidden = states.shape
    if tokens < hidden:
        root = weights.sqrt()[:, None]
        weighed = states * root
        system = (weighed @ weighed.T).double()
        system.diagonal().add_(penalty * float(system.trace()) / hidden)
        inner = torch.cholesky_solve((targets * root).double(), torch.linalg.cholesky(system))
        return inner.float().T @ weighed
    system = gram_of(states, weights).double()
    system.diagonal().add_(penalty * float(system.trace()) / hidden)
    moments = states.T @ (targets * weights[:, None])
    return torch.cholesky_solve(moments.double(), torch.linalg.cholesky(system)).float().T
