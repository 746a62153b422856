"""Judging a router on the prompts that it was made from."""

from itertools import combinations

import torch

from moemerge.routers.report import LayerRouting
from moemerge.routers.request import RouterInputs
from moemerge.routers.rows import top_weights


def route_layer(rows: torch.Tensor, inputs: RouterInputs, experts_per_token: int) -> LayerRouting:
    """Route one layer's inputs by router rows (expert, hidden)."""
    states, expert = inputs.states[inputs.positive], inputs.expert[inputs.positive]
    weights, chosen = top_weights(rows, states, experts_per_token)
    reached = torch.zeros(len(states), len(rows)).scatter_(1, chosen, 1.0)
    by_prompt = torch.stack([reached[expert == index].mean(dim=0) for index in range(len(rows))])
    first = [float((chosen[expert == index, 0] == index).float().mean()) for index in range(len(rows))]
    return LayerRouting(
        own=tuple(by_prompt.diagonal().tolist()),
        first=tuple(first),
        load=tuple(by_prompt.mean(dim=0).tolist()),
        top_weight=float(weights[:, 0].mean()),
    )


def row_distances(rows: torch.Tensor) -> dict[tuple[int, int], float]:
    """By pair of experts: how far apart their rows (layer, expert, hidden) are, 0 for equal and 1 for opposite."""
    distances = {}
    for a, b in combinations(range(rows.shape[1]), 2):
        first, second = rows[:, a], rows[:, b]
        lengths = (first.norm(dim=1) + second.norm(dim=1)).clamp(min=torch.finfo(rows.dtype).tiny)
        distances[a, b] = float(((first - second).norm(dim=1) / lengths).mean())
    return distances
