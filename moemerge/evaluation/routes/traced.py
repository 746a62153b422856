"""Texts with the experts that each layer's router chose for each of their tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TracedText:
    """One text's tokens and their experts."""

    name: str
    tokens: tuple[str, ...]
    """Pieces of the text, which concatenated give the whole; a part of a letter is U+FFFD."""
    experts: NDArray[np.int64]
    """Numbers of the chosen experts (layer, token, choice), by falling weight."""
    weights: NDArray[np.float32]
    """Weights of the chosen experts (layer, token, choice); those of one token sum to 1."""


@dataclass(frozen=True)
class Routes:
    """Texts that one model has read, with their experts."""

    model: str
    """The model's name."""
    experts: tuple[str, ...]
    """Names of the experts."""
    layers: tuple[int, ...]
    """Numbers of the layers that have routers."""
    texts: tuple[TracedText, ...]

    def mean_weights(self, text: TracedText) -> NDArray[np.float64]:
        """Average the weights over layers (token, expert); each token's sum to 1."""
        means = np.zeros((len(text.tokens), len(self.experts)))
        tokens = np.broadcast_to(np.arange(len(text.tokens))[None, :, None], text.experts.shape)
        np.add.at(means, (tokens, text.experts), text.weights)
        return means / len(self.layers)

    def majority(self, text: TracedText) -> NDArray[np.int64]:
        """The expert of each token (token,) with the largest weight summed over layers; the first of equal ones."""
        chosen: NDArray[np.int64] = self.mean_weights(text).argmax(axis=1)
        return chosen

    def shares(self, text: TracedText, layer_index: int | None = None) -> NDArray[np.float64]:
        """Share of tokens that choose each expert first (expert,), from 0 to 1: in one layer, or averaged over all."""
        first = text.experts[:, :, 0] if layer_index is None else text.experts[layer_index, :, 0]
        return np.bincount(first.ravel(), minlength=len(self.experts)) / max(first.size, 1)

    def load(self) -> NDArray[np.float64]:
        """Share of all texts' tokens that have each expert among their choices (layer, expert), from 0 to 1."""
        tokens = sum(len(text.tokens) for text in self.texts)
        counts = np.zeros((len(self.layers), len(self.experts)))
        for text in self.texts:
            counts += [np.bincount(chosen.ravel(), minlength=len(self.experts)) for chosen in text.experts]
        return counts / max(tokens, 1)
