"""Routers that know nothing: for models that will be trained, and as baselines.

A router input is a normed state of length about sqrt(hidden). Rows with elements of standard deviation
1/sqrt(hidden) therefore give logits of about 1; with N(0, 1) the softmax would be saturated from the start.
"""

import math

import torch

from moemerge.routers.request import LayerRouter, RouterInputs, RouterRequest


def random_router(request: RouterRequest) -> LayerRouter:
    """Rows from N(0, 1/hidden), seeded."""
    generator = torch.Generator().manual_seed(request.seed)
    shape, scale = _shape(request), 1 / math.sqrt(request.base.config["hidden_size"])

    def rows(_layer: int, _inputs: RouterInputs | None) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    return rows


def uniform_random_router(request: RouterRequest) -> LayerRouter:
    """Rows from U(-1/sqrt(hidden), 1/sqrt(hidden)), as `torch.nn.Linear` starts, seeded."""
    generator = torch.Generator().manual_seed(request.seed)
    shape, bound = _shape(request), 1 / math.sqrt(request.base.config["hidden_size"])

    def rows(_layer: int, _inputs: RouterInputs | None) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    return rows


def _shape(request: RouterRequest) -> tuple[int, int]:
    return len(request.experts), request.base.config["hidden_size"]
