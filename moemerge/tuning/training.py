"""The steps of a tuning: batches, losses, Adam, and which state was the best on held-out text."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from moemerge.passes.tokens import Window
from moemerge.tuning.batches import Batches
from moemerge.tuning.judging import Judge
from moemerge.tuning.losses import anchor_loss, load_loss, prior_of, text_loss
from moemerge.tuning.settings import Settings, distillation_weight
from moemerge.tuning.student import Student, padded
from moemerge.tuning.teacher import Predictions
from moemerge.tuning.whole import TOKENS_AT_ONCE
from moemerge.tuning.work import State, Work

_BETAS: Final = (0.9, 0.95)
_WARM_UP: Final = 0.1
_CLIP: Final = 1.0
_JUDGEMENTS: Final = 4
_PATIENCE: Final = 3


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a warm-up over a tenth of the steps, then half a cosine."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_optimiser(
    gates: Mapping[int, torch.Tensor], lengths: Mapping[int, float], settings: Settings
) -> torch.optim.Optimizer:  # fmt: skip
    """Adam for gates by layer, each at a rate of its own: the longer the states that enter a layer, the lower."""
    rates = {layer: settings.lr / max(lengths[layer], 1e-6) for layer in gates}
    groups = [{"params": [gate], "lr": rates[layer], "highest_lr": rates[layer]} for layer, gate in gates.items()]
    return torch.optim.Adam(groups, betas=_BETAS)


def set_rates(optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
    """What the schedule says of this step, for an optimiser of `make_optimiser`."""
    for group in optimiser.param_groups:
        group["lr"] = group["highest_lr"] * schedule(step, steps)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of this seed, the same before and after an interruption."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass
class Training:
    """Trains a student's gates; see `run`."""

    student: Student
    batches: Batches
    judge: Judge
    teachers: Mapping[int, Predictions]
    """By domain."""
    settings: Settings
    accelerator: Any
    work: Work
    progress: Callable[[int, int], None]
    announce: Callable[[str], None]

    def run(self) -> State:
        """Train until the steps are done or held-out text says that more is of no use.

        Raises:
            CheckpointError: losses are not finite.
        """
        start = self.student.rows()
        state = self.work.load()
        before = state.before if state else self.judge.judge()
        optimiser = self._optimiser()
        if state is None:
            state = State(0, 0, 0, 0.0, before, before, start, start, {})
        else:
            self.student.place(state.rows)
            optimiser.load_state_dict(state.optimiser)
        anchored = {layer: rows.to(self.student.device) for layer, rows in start.items()}
        every = max(1, self.settings.steps // _JUDGEMENTS)
        while state.step < self.settings.steps and state.unimproved < _PATIENCE:
            begun = time.perf_counter()
            set_rates(optimiser, state.step, self.settings.steps)
            with seeded(self._seed(state.step)), self.student.noisy(self.settings.noise):
                self._gradients(state.step, anchored)
            optimiser.step()
            state.seconds += time.perf_counter() - begun
            state.step += 1
            if state.step % every == 0 or state.step == self.settings.steps:
                self._judge(state)
            state.rows, state.optimiser = self.student.rows(), optimiser.state_dict()
            if self.accelerator.is_main_process:
                self.work.save(state)
            self.progress(state.step, self.settings.steps)
        return state

    def _optimiser(self) -> torch.optim.Optimizer:
        if not self.judge.lengths:
            self.judge.judge()
        return make_optimiser(self.student.gates, self.judge.lengths, self.settings)

    def _seed(self, step: int) -> int:
        place = step * self.accelerator.num_processes + self.accelerator.process_index
        return hash((self.settings.seed, place)) % 2**31  # of numbers, the same in every process

    def _gradients(self, step: int, start: Mapping[int, torch.Tensor]) -> None:
        """Give the gates the gradients of a step's loss, averaged over all processes."""
        gates = list(self.student.gates.values())
        for gate in gates:
            gate.grad = None
        everything = self.batches.step(step)
        total = sum(sum(window.scored) for window, _ in everything)
        mine = everything[self.accelerator.process_index :: self.accelerator.num_processes]
        weight = distillation_weight(step, self.settings.steps) if self.teachers else 0.0
        experts = [self.batches.training.expert[domain] for _, domain in everything]
        prior = prior_of(experts, len(self.student.mixture.experts), self.student.device)
        for part in _parts(mine):
            windows = [window for window, _ in part]
            with self.accelerator.autocast():
                logits = self.student.logits(windows)
            teachers = [self.teachers.get(domain) for _, domain in part]
            loss = text_loss(windows, logits, teachers, weight)[0].sum() / total
            counted = padded(windows, self.student.device)[1]
            share = sum(sum(window.scored) for window in windows) / total
            loss = loss + share * (load_loss(self.student, counted, prior) + anchor_loss(self.student, start))
            self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([gate.grad.flatten() for gate in gates]), "sum")  # type: ignore[union-attr]
            for gate, gradient in zip(gates, flat.split([gate.numel() for gate in gates]), strict=True):
                gate.grad = gradient.view_as(gate)
        torch.nn.utils.clip_grad_norm_(gates, _CLIP)

    def _judge(self, state: State) -> None:
        found = self.judge.judge()
        better = found.mean_loss < state.best.mean_loss
        state.unimproved = 0 if better else state.unimproved + 1
        if better:
            state.best_step, state.best, state.best_rows = state.step, found, self.student.rows()
        self.announce(
            f"step {state.step} of {self.settings.steps}: held-out loss {found.mean_loss:.4f} (at the start "
            f"{state.before.mean_loss:.4f}, best {state.best.mean_loss:.4f} after step {state.best_step}); "
            f"{state.seconds / state.step:.2f} s per step"
        )


def _parts(windows: Sequence[tuple[Window, int]]) -> Iterator[list[tuple[Window, int]]]:
    """As many windows as may pass at once."""
    part: list[tuple[Window, int]] = []
    for window in windows:
        if part and (len(part) + 1) * max(len(one.ids) for one, _ in [*part, window]) > TOKENS_AT_ONCE:
            yield part
            part = []
        part.append(window)
    if part:
        yield part
