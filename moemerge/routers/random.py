"""Random routers, for models that will be trained and as baselines. This module does not import torch.

A router input is a normed state of length about sqrt(hidden). Rows with elements of standard deviation
1/sqrt(hidden) therefore give logits of about 1; with N(0, 1) the softmax would be saturated from the start.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from moemerge.routers.request import RouterRequest
from moemerge.routers.rows import Rows

Shape = tuple[int, int, int]
"""Layers, experts, hidden width."""


def _normal(generator: np.random.Generator, shape: Shape) -> Rows:
    return generator.standard_normal(shape, np.float32) / _root(shape)


def _uniform(generator: np.random.Generator, shape: Shape) -> Rows:
    return (generator.random(shape, np.float32) * 2 - 1) / _root(shape)


def _root(shape: Shape) -> np.float32:
    return np.float32(math.sqrt(shape[-1]))


DRAWS: Final[dict[str, Callable[[np.random.Generator, Shape], Rows]]] = {"random": _normal, "uniform_random": _uniform}
"""Functions that draw rows (layer, expert, hidden), by `gate_mode`."""


def normal_rows(request: RouterRequest, seed: int) -> dict[int, Rows]:
    """Draw each layer's rows (expert, hidden) from N(0, 1/hidden), seeded; zeros for absent experts."""
    return _placed(DRAWS["random"](np.random.default_rng(seed), _shape(request)), request)


def uniform_rows(request: RouterRequest, seed: int) -> dict[int, Rows]:
    """Draw each layer's rows (expert, hidden) from U(-1/sqrt(hidden), 1/sqrt(hidden)), seeded.

    These are the initial weights of a `torch.nn.Linear`. Rows of absent experts are zeros.
    """
    return _placed(DRAWS["uniform_random"](np.random.default_rng(seed), _shape(request)), request)


def _shape(request: RouterRequest) -> Shape:
    """Shape (layer, expert, hidden) of rows for all layers and experts; rows must not depend on which are absent."""
    base = request.base.model
    return base.layers, len(request.config.experts), base.config["hidden_size"]


def _placed(drawn: Rows, request: RouterRequest) -> dict[int, Rows]:
    """Select the rows of each layer that has a router out of all (layer, expert, hidden)."""
    for layer, absent in request.mixture.absent.items():
        drawn[layer, sorted(absent)] = 0
    return {layer: drawn[layer] for layer in request.mixture.moe_layers}
