"""The loss of each token of a window of text."""

import torch

from moemerge.passes.tokens import Window


def token_losses(window: Window, logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (token,) in nats of a window's tokens that are scored, from its logits (position, vocab)."""
    ids = torch.tensor(window.ids, device=logits.device)
    scored = torch.tensor(window.scored, device=logits.device)
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[scored]
