"""Judge a router on the prompts that it was made from."""

import math

import torch

from moemerge.routers.pass_inputs import PassRequest, RouterInputs
from moemerge.routers.report import LayerRouting
from moemerge.routers.scoring import top_weights


def route_layer(
    rows: torch.Tensor, inputs: RouterInputs, request: PassRequest, held_out: tuple[float | None, ...] | None = None
) -> LayerRouting:
    """Route one layer's inputs by router rows (expert, hidden), and measure the result."""
    absent = request.absent(inputs.layer)
    states, expert = inputs.states[inputs.routed], inputs.expert[inputs.routed]
    logits = states @ rows.T
    logits[:, sorted(absent)] = -math.inf
    weights, chosen = top_weights(logits, request.mixture.experts_per_token, request.scoring)
    reached = torch.zeros(len(states), len(rows)).scatter_(1, chosen, 1.0)
    by_prompt = torch.stack([reached[expert == index].mean(dim=0) for index in range(len(rows))])
    first = [float((chosen[expert == index, 0] == index).float().mean()) for index in range(len(rows))]

    def of_present(shares: list[float]) -> tuple[float | None, ...]:
        return tuple(None if index in absent else share for index, share in enumerate(shares))

    return LayerRouting(
        layer=inputs.layer,
        hit_rate=of_present(by_prompt.diagonal().tolist()),
        top1_accuracy=of_present(first),
        load=of_present(by_prompt.mean(dim=0).tolist()),
        top_weight=float(weights[:, 0].mean()),
        held_out=held_out,
    )
