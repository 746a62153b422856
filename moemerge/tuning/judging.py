"""The student's losses and choices on held-out text, by as many processes as there are."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from moemerge.errors import CheckpointError
from moemerge.evaluation.figures import estimate
from moemerge.evaluation.measuring import Texts
from moemerge.passes.decoder import group
from moemerge.tuning.losses import text_loss
from moemerge.tuning.settings import Held
from moemerge.tuning.student import Student, padded
from moemerge.tuning.whole import TOKENS_AT_ONCE


class Judge:
    """Judges rows as they would be stored."""

    def __init__(self, student: Student, texts: Texts, dtypes: Mapping[int, torch.dtype], accelerator: Any) -> None:
        """Judge by these texts; `dtypes` are those of the stored gates, by layer."""
        self._student, self._texts, self._dtypes, self._accelerator = student, texts, dtypes, accelerator
        self.lengths: dict[int, float] = {}
        """By layer: root mean square length of what enters the router, in the last judgement."""

    def judge(self) -> Held:
        """Judge the gates as they are now.

        Raises:
            CheckpointError: the losses are not finite.
        """
        student, texts = self._student, self._texts
        losses = torch.zeros(len(texts.windows), dtype=torch.float64)
        first = torch.zeros(len(texts.domains), len(student.mixture.experts))
        squares, tokens = dict.fromkeys(student.gates, 0.0), 0
        rounded = {layer: gate.detach().to(self._dtypes[layer]) for layer, gate in student.gates.items()}
        mine = range(self._accelerator.process_index, len(losses), self._accelerator.num_processes)
        parts = group(mine, lambda place: len(texts.windows[place].ids), TOKENS_AT_ONCE) if mine else ()
        with torch.no_grad(), student.holding(rounded), self._accelerator.autocast():
            for part in parts:
                windows = [texts.windows[place] for place in part]
                found = text_loss(windows, student.logits(windows), [None] * len(part), 0)[1]
                losses[part] = found.cpu().double()
                counted = padded(windows, student.device)[1]
                domain = torch.tensor([texts.domain[place] for place in part], device=student.device)
                of_token = domain[:, None].expand_as(counted)[counted] * first.shape[1]
                tokens += len(of_token)
                for layer in student.gates:
                    choices = of_token + student.choices(layer)[counted.flatten()].argmax(dim=1)
                    first += torch.bincount(choices, minlength=first.numel()).view(first.shape).cpu()
                    squares[layer] += float(student.inputs[layer][counted.flatten()].square().sum())
        losses, first = self._sum(losses), self._sum(first)
        read = self._sum(torch.tensor([*squares.values(), float(tokens)], dtype=torch.float64)).tolist()
        self.lengths = {layer: math.sqrt(total / read[-1]) for layer, total in zip(squares, read, strict=False)}
        if not losses.isfinite().all():
            raise CheckpointError(
                f"{student.mixture.folder}: its losses are not finite numbers, so its weights are damaged or overflow."
            )
        by_domain = {
            name: estimate(texts.sums(losses[texts.of(place)], texts.of(place)))
            for place, name in enumerate(texts.domains)
        }
        accuracy = {
            name: None if expert is None else float(first[place, expert] / first[place].sum())
            for place, (name, expert) in enumerate(zip(texts.domains, texts.expert, strict=True))
        }
        return Held(by_domain, math.fsum(one.value for one in by_domain.values()) / len(by_domain), accuracy)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Values added up over all processes."""
        if self._accelerator.num_processes == 1:
            return values
        dtype = torch.float32 if self._accelerator.device.type == "mps" else values.dtype
        summed: torch.Tensor = self._accelerator.reduce(values.to(self._accelerator.device, dtype), "sum")
        return summed.to("cpu", values.dtype)
