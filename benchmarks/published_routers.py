"""Routers by published methods that are no `gate_mode`: DUME's form, and PHATGOOSE, which `moemerge tune` trains."""

from pathlib import Path
from typing import Final

import torch

from moemerge import plan_merge
from moemerge.config.schema import MergeConfig
from moemerge.evaluation.runnable import MixtureModel, open_mixture
from moemerge.passes.compute_dtype import Compute
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.regression import regress
from moemerge.routers.streamed_pass import capture_router_inputs
from moemerge.tuning.settings import Settings
from moemerge.tuning.tuner import tune

_DUME_LAMBDA: Final = 0.01
_EVEN_PENALTY: Final = 0.001


def dume_rows(config: MergeConfig, compute: Compute) -> dict[int, torch.Tensor]:
    """Make rows (expert, hidden) by layer as DUME does: https://arxiv.org/abs/2603.29765.

    That is ridge regression with a bias and an absolute lambda, and each row with its bias divided by its length. A
    Mixtral's router has no bias, so it lies along a direction in which all text is about equally far. The states are
    the base model's, as for every `gate_mode`; DUME's are those of averaged shared weights and each text's own expert.
    """
    request = plan_merge(config).router_request
    longest = request.base.model.config["max_position_embeddings"]
    prompts = encode_prompts(request.folder, config, longest, seed=0)
    asked = PassRequest(request.base, request.mixture, request.scoring, prompts, compute, config.router)
    return {
        inputs.layer: dume_row_matrix(inputs.states, inputs.expert, len(config.experts))
        for inputs in capture_router_inputs(asked)
    }


def dume_row_matrix(states: torch.Tensor, expert: torch.Tensor, experts: int) -> torch.Tensor:
    """Fit rows (expert, hidden) to states (token, hidden) and the expert of each (token,)."""
    with_one = torch.cat([states, torch.ones(len(states), 1)], dim=1)
    targets = torch.nn.functional.one_hot(expert, experts).float()
    penalty = _DUME_LAMBDA * with_one.shape[1] / float(with_one.square().sum())  # `regress` takes a relative one
    found = regress(with_one, targets, torch.ones(len(states)), penalty)
    rows, bias = found[:, :-1], found[:, -1:]
    even = regress(states, torch.ones(len(states), 1), torch.ones(len(states)), _EVEN_PENALTY)
    finished: torch.Tensor = (rows + bias * even) / rows.norm(dim=1, keepdim=True)
    return finished


def phatgoose_rows(
    mixture: MixtureModel, texts: dict[str, str], tokens: int, compute: Compute, copy: Path
) -> dict[int, torch.Tensor]:
    """Make rows (expert, hidden) by layer as `tune --method phatgoose` does, from so many tokens of each expert's text.

    They are the mixture's own where held-out text does not say that the trained ones are better.

    Args:
        mixture: a merged model, which stays as it is.
        texts: a file for each expert.
        tokens: tokens that each expert's gate is trained on.
        compute: what models are run in.
        copy: a folder for the tuned model.
    """
    steps = max(1, tokens // Settings.tokens_per_step)
    in_bfloat16 = compute.dtype == torch.bfloat16
    settings = Settings(steps=steps, method="phatgoose", compute_dtype="bfloat16" if in_bfloat16 else "float32")
    found = tune(mixture.folder, {name: [text] for name, text in texts.items()}, settings, copy=copy, device="cpu")
    assert found, "nothing was cut off"
    tuned = open_mixture(found.model)
    return {layer: tuned.runnable.read(tuned.router(layer)).float() for layer in tuned.moe_layers}
