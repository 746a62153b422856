"""Experts that hardly a token chooses, and those that nearly every token does."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.analysis.figures import Numbers, TextFigures

_DEAD: Final = 0.1
_SUPER: Final = 0.9


def dead_experts(figures: TextFigures) -> dict[int, tuple[int, ...]]:
    """Find experts with less than a tenth of an equal share of the choices, by layer; layers without any are left out.

    An expert of a layer with E experts, of which k take each token, has an equal share if a share of k / E of the
    tokens choose it. Experts that a layer lacks are not among them.
    """
    equal = figures.frequency.sum(axis=1, keepdims=True) / _present(figures).sum(axis=1, keepdims=True)
    return _by_layer(figures, figures.frequency < _DEAD * equal)


def super_experts(figures: TextFigures) -> dict[int, tuple[int, ...]]:
    """Find experts that at least 90 % of the tokens choose, by layer; layers without any are left out.

    Such an expert does the work of a shared one. Layers in which all experts take every token have none. Not to be
    confused with the "super experts" of https://arxiv.org/abs/2507.23279, whose outputs have a few extreme values.
    """
    chooses = figures.frequency.sum(axis=1, keepdims=True) < _present(figures).sum(axis=1, keepdims=True) - 0.5
    return _by_layer(figures, (figures.frequency >= _SUPER) & chooses)


def _present(figures: TextFigures) -> Numbers:
    return (~np.isnan(figures.output_norm)).astype(np.float64)


def _by_layer(figures: TextFigures, found: NDArray[np.bool_]) -> dict[int, tuple[int, ...]]:
    held = found & (_present(figures) > 0)
    return {
        layer: tuple(experts.nonzero()[0].tolist())
        for layer, experts in zip(figures.layers, held, strict=True)
        if experts.any()
    }
