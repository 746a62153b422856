"""Log-probabilities, for engines that give logits."""

import numpy as np


def logprobs_of(logits: np.ndarray) -> np.ndarray:
    """(position, vocab) log-probabilities in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
