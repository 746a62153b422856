"""Judging a router on the prompts that it was made from."""

import torch

from moemerge.routers.report import LayerRouting
from moemerge.routers.request import RouterInputs


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


def top_weights(rows: torch.Tensor, states: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and indices (token, experts_per_token) of the experts that a Mixtral router with these rows chooses."""
    chosen = (states @ rows.T).topk(experts_per_token, dim=1)
    return chosen.values.softmax(dim=1), chosen.indices
