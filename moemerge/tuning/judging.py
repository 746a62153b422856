"""Judge the student on held-out text: its losses and choices, computed by all processes together."""

import math
from collections.abc import Mapping

import torch

from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import CheckpointError
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import estimate
from moemerge.evaluation.runnable import MixtureModel
from moemerge.evaluation.running import run_model
from moemerge.passes.decoder import group
from moemerge.tuning.context import TuningContext
from moemerge.tuning.settings import HeldOutScores
from moemerge.tuning.student import Student, cross_entropy


def as_stored(mixture: MixtureModel, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round tensors to the dtypes that the mixture stores them in."""
    return {
        name: tensor.detach().to(getattr(torch, CONFIG_DTYPES[mixture.tensors[name].dtype]))
        for name, tensor in values.items()
    }


def judge(context: TuningContext, student: Student, texts: Texts) -> tuple[HeldOutScores, dict[int, float]]:
    """Judge the student as it would be stored on held-out text; also gives the length of what enters each router.

    That length is a root mean square, by layer.

    Raises:
        CheckpointError: the losses are not finite; says where that began, if the stored model is at fault.
        RouterError: another process has ended.
    """
    experts = len(student.mixture.experts)
    losses = torch.zeros(len(texts.windows), dtype=torch.float64)
    first = torch.zeros(len(texts.domains), experts, dtype=torch.float64)
    squares, tokens = dict.fromkeys(student.gates, 0.0), 0
    mine = context.processes.mine(range(len(losses)))
    parts = group(mine, lambda place: len(texts.windows[place].ids), context.memory.tokens_at_once)
    with torch.no_grad(), student.holding(as_stored(student.mixture, student.trained)), context.processes.autocast():
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
        run_model(student.mixture.runnable, texts.windows, context.processes.compute)
        raise CheckpointError(
            f"{student.mixture.folder}: its losses are not finite numbers: with what it has been taught, its numbers "
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
