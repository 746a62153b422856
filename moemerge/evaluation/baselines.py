"""Models that are made of others while they run, to compare a mixture with: never written to the disk."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.families.stored_mixture import per_token_key


def average(name: str, models: Sequence[Runnable]) -> Runnable | str:
    """Make the weight average of models of one shape; a returned text says why there is none."""
    first = models[0]
    for model in models[1:]:
        if model.model_type != first.model_type or model.shapes != first.shapes:
            return f"{model.name} and {first.name} differ in their tensors, so their weights have no average"

    def read(tensor: str) -> torch.Tensor:
        total = first.read(tensor).float()
        for model in models[1:]:
            total += model.read(tensor)
        return total / len(models)

    def rows(table: str, ids: list[int]) -> torch.Tensor:
        return torch.stack([model.rows(table, ids) for model in models]).mean(dim=0)

    known = [model.identity for model in models]
    return replace(first, name=name, read=read, rows=rows, identity=f"mean of {known}" if all(known) else "")


def uniform(model: MixtureModel) -> Runnable | str:
    """Make the mixture of all experts with equal weights, by a router of zeros; a returned text says why not."""
    if any(model.absent(layer) for layer in model.moe_layers):
        return "experts are absent from some layers, so there is no uniform mixture of all"
    key, count = per_token_key(model.family), len(model.experts)
    asked = model.runnable.keys[key]
    keys = {**model.runnable.keys, key: count if isinstance(asked, int) else [count] * len(asked)}
    # Experts of all groups take part, and their equal weights add up to 1.
    keys |= {"topk_group": keys["n_group"]} if keys.get("n_group") else {}
    keys |= {"norm_topk_prob": True} if "norm_topk_prob" in keys else {}
    silent = model.with_rows("uniform mixture", lambda layer: torch.zeros(model.runnable.shapes[model.router(layer)]))
    return replace(silent.runnable, keys=keys)


def forced(model: MixtureModel, expert: int) -> Runnable:
    """Make the mixture in which every token goes to one expert: all experts are that one."""
    prefix = r"model\.layers\.\d+\."
    separate = [name.split("{expert}") for name in model.family.experts if "{expert}" in name]
    numbered = [re.compile(f"({prefix}{re.escape(before)})\\d+({re.escape(after)})") for before, after in separate]
    stacked = [re.compile(prefix + re.escape(name)) for name in model.family.experts if "{expert}" not in name]
    given = model.runnable.read

    def read(tensor: str) -> torch.Tensor:
        for pattern in numbered:
            if match := pattern.fullmatch(tensor):
                return given(f"{match[1]}{expert}{match[2]}")
        values = given(tensor)
        if any(pattern.fullmatch(tensor) for pattern in stacked):
            values = values[expert].expand_as(values).contiguous()
        return values

    return replace(model.runnable, name=f"all to {model.experts[expert]}", read=read)
