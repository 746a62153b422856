"""Judge the student on held-out text: its losses and choices, computed by all processes together."""

import math
from collections.abc import Sequence

import torch

from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import CheckpointError
from moemerge.evaluation.figures import estimate
from moemerge.evaluation.measuring import Texts
from moemerge.evaluation.runnable import Runnable
from moemerge.evaluation.running import run_model
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.decoder import group
from moemerge.passes.tokens import Window
from moemerge.tuning.context import TuningContext
from moemerge.tuning.losses import cross_entropy
from moemerge.tuning.settings import HeldOutScores
from moemerge.tuning.student import Student


def stored_dtypes(context: TuningContext) -> dict[int, torch.dtype]:
    """The dtype in which each layer's gate is stored, by layer."""
    mixture = context.mixture
    return {
        layer: getattr(torch, CONFIG_DTYPES[mixture.tensors[mixture.router(layer)].dtype])
        for layer in mixture.moe_layers
    }


def judge_start(context: TuningContext, student: Student, texts: Texts) -> tuple[HeldOutScores, dict[int, float]]:
    """Judge the gates that are stored; see `judge`.

    Raises:
        CheckpointError: numbers are not finite; says where that began.
        RouterError: another process has ended.
    """
    try:
        return judge(context, student, texts)
    except CheckpointError:
        find_not_finite(context, [context.mixture.runnable], texts.windows)
        raise


def find_not_finite(context: TuningContext, models: Sequence[Runnable], windows: Sequence[Window]) -> None:
    """Run stored models over windows a layer at a time, to find where numbers stop being finite.

    Raises:
        CheckpointError: numbers of one of them are not finite.
    """
    compute = Compute(context.processes.device, context.processes.dtype)
    for model in models:
        run_model(model, windows, compute)


def judge(context: TuningContext, student: Student, texts: Texts) -> tuple[HeldOutScores, dict[int, float]]:
    """Judge the gates as they would be stored on held-out text; also gives the root mean square length of their inputs.

    Raises:
        CheckpointError: the losses are not finite.
        RouterError: another process has ended.
    """
    experts = len(student.mixture.experts)
    losses = torch.zeros(len(texts.windows), dtype=torch.float64)
    first = torch.zeros(len(texts.domains), experts, dtype=torch.float64)
    squares, tokens = dict.fromkeys(student.gates, 0.0), 0
    rounded = {layer: student.gates[layer].detach().to(dtype) for layer, dtype in stored_dtypes(context).items()}
    mine = context.processes.mine(range(len(losses)))
    parts = group(mine, lambda place: len(texts.windows[place].ids), context.memory.tokens_at_once)
    with torch.no_grad(), student.holding(rounded), context.processes.autocast():
        for part in parts:
            windows = [texts.windows[place] for place in part]
            losses[part] = cross_entropy(windows, student.logits(windows)).cpu().double()
            counted = student.counted
            domain = torch.tensor([texts.domain[place] for place in part], device=student.device)
            of_token = domain[:, None].expand_as(counted)[counted] * experts
            tokens += len(of_token)
            for layer in student.gates:
                choices = of_token + student.router_logits(layer)[counted.flatten()].argmax(dim=1)
                first += torch.bincount(choices, minlength=first.numel()).view(first.shape).cpu()
                squares[layer] += float(student.inputs[layer][counted.flatten()].square().sum())
    losses, first = context.processes.sum(losses), context.processes.sum(first)
    read = torch.tensor([*squares.values(), float(tokens)], dtype=torch.float64)
    *totals, counted_tokens = context.processes.sum(read).tolist()
    if not losses.isfinite().all():
        raise CheckpointError(
            f"{student.mixture.folder}: its losses are not finite numbers: with the gates that it has now, its numbers "
            "overflow."
        )
    sums = {name: texts.sums(losses[texts.of(place)], texts.of(place)) for place, name in enumerate(texts.domains)}
    by_domain = {name: estimate(found) for name, found in sums.items()}
    accuracy = {
        name: None if expert is None else float(first[place, expert] / first[place].sum())
        for place, (name, expert) in enumerate(zip(texts.domains, texts.expert, strict=True))
    }
    mean = math.fsum(one.value for one in by_domain.values()) / len(by_domain)
    lengths = {layer: math.sqrt(total / counted_tokens) for layer, total in zip(squares, totals, strict=True)}
    return HeldOutScores(by_domain, mean, accuracy, {name: found.tolist() for name, found in sums.items()}), lengths
