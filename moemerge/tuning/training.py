"""The steps of a tuning: batches, losses, Adam, and which state was the best on held-out text."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch.nn.utils import parameters_to_vector

from moemerge.errors import CheckpointError
from moemerge.evaluation.runnable import Runnable
from moemerge.evaluation.running import run_model
from moemerge.passes.decoder import group
from moemerge.passes.tokens import Window, count_scored
from moemerge.progress import Task
from moemerge.tuning.batches import Batches
from moemerge.tuning.context import TuningContext
from moemerge.tuning.judging import judge
from moemerge.tuning.resume_folder import State
from moemerge.tuning.settings import Settings, distillation_weight
from moemerge.tuning.student import Student, cross_entropy
from moemerge.tuning.teachers import Predictions, distillation_loss, teach

_BETAS: Final = (0.9, 0.95)
_WARM_UP: Final = 0.1
_CLIP: Final = 1.0
_JUDGEMENTS: Final = 4
_PATIENCE: Final = 3
# How far a step of Adam moves a norm's weight, as a share of --lr and of the norm's scale.
_NORM_RATE: Final = 0.06
_Key = TypeVar("_Key")


def schedule(step: int, steps: int) -> float:
    """The factor on the learning rate: a warm-up over a tenth of the steps, then half a cosine."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_optimiser(
    trained: Mapping[_Key, torch.Tensor], lengths: Mapping[_Key, float], settings: Settings
) -> torch.optim.Optimizer:
    """Make Adam for tensors, each with its own rate: the longer what enters it, the lower.

    Args:
        trained: tensors of any shape.
        lengths: root mean square length of the states that are multiplied with each.
        settings: the options of the training.
    """
    rates = {key: settings.lr / max(lengths[key], 1e-6) for key in trained}
    groups = [{"params": [one], "lr": rates[key], "highest_lr": rates[key]} for key, one in trained.items()]
    return torch.optim.Adam(groups, betas=_BETAS)


def set_rates(optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Set the rates that the schedule has for this step, in an optimiser of `make_optimiser`."""
    for rates in optimiser.param_groups:
        rates["lr"] = rates["highest_lr"] * schedule(step, steps)


def train(context: TuningContext, batches: Batches, teachers: Mapping[int, Runnable]) -> State:
    """Train gates, and what else is trained, together; see `Training.run`.

    Args:
        context: the context of the tuning.
        batches: the windows to read.
        teachers: the experts of `open_teachers`, by domain.

    Raises:
        CheckpointError: tensors do not fit a class, or losses are not finite.
        RouterError: another process has ended.
    """
    predictions = teach(context, batches, teachers) if context.settings.distil else {}
    return Training(context, batches, Student.load(context), predictions).run()


@dataclass
class Training:
    """The training of a student."""

    context: TuningContext
    batches: Batches
    student: Student
    teachers: Mapping[int, Predictions]
    """Predictions of the teachers, by domain."""

    def run(self) -> State:
        """Train until the steps are done, or held-out text shows that more training is of no use."""
        settings, trained = self.context.settings, self.student.trained
        if state := self.context.work.load():
            self.student.place(state.values)
            optimiser = make_optimiser(trained, dict.fromkeys(trained, 1.0), settings)
            optimiser.load_state_dict(state.optimiser)  # rates, too
        else:
            self.context.announce("reading the held-out text, before the first step")
            before, lengths = judge(self.context, self.student, self.batches.held_out)
            optimiser = make_optimiser(trained, self._lengths(lengths), settings)
            start = self.student.values()
            state = State(0, 0, 0, 0.0, before, before, start, start, {})
        every = math.ceil(settings.steps / _JUDGEMENTS)
        self.context.progress(Task("steps"), state.step, settings.steps)
        while state.step < settings.steps and state.without_gain < _PATIENCE:
            begun = time.perf_counter()
            set_rates(optimiser, state.step, settings.steps)
            with self.student.noisy(settings.noise, self._seed(state.step)):
                self.set_gradients(state.step)
            torch.nn.utils.clip_grad_norm_(trained.values(), _CLIP)
            optimiser.step()
            state.seconds += time.perf_counter() - begun
            state.step += 1
            judged = state.step % every == 0 or state.step == settings.steps
            news = self._judge(state) if judged else ""
            state.values, state.optimiser = self.student.values(), optimiser.state_dict()
            if self.context.processes.first:
                self.context.work.save(state)
            if news:
                self.context.announce(news)
            self.context.progress(Task("steps"), state.step, settings.steps)
        return state

    def _lengths(self, of_inputs: Mapping[int, float]) -> dict[str, float]:
        """The lengths of `make_optimiser` by name: of a layer's inputs for its gate; for a norm, from its own scale."""
        offset = self.context.mixture.family.norm_offset
        scales = {name: float((w.detach() + offset).square().mean().sqrt()) for name, w in self.student.trained.items()}
        found = {name: 1 / max(_NORM_RATE * scale, 1e-6) for name, scale in scales.items()}
        return found | {self.context.mixture.router(layer): length for layer, length in of_inputs.items()}

    def _seed(self, step: int) -> int:
        place = step * self.context.processes.count + self.context.processes.rank
        return hash((self.context.settings.seed, place)) % 2**31  # of numbers, the same in every process

    def set_gradients(self, step: int) -> None:
        """Give the trained tensors the gradients of a step's loss, added up over all processes.

        Raises:
            CheckpointError: numbers of the stored model are not finite on this text.
        """
        trained, windows = list(self.student.trained.values()), self.batches.step(step)
        for one in trained:
            one.grad = torch.zeros_like(one)
        scored = count_scored(window for window, _ in windows)
        mine = self.context.processes.mine(windows)
        for part in group(mine, lambda one: len(one[0].ids), self.context.memory.tokens_at_once):
            torch.autograd.backward(self._loss(step, part, scored))
        summed = self.context.processes.sum(parameters_to_vector(one.grad for one in trained if one.grad is not None))
        if not summed.isfinite().all() and all(one.isfinite().all() for one in trained):
            # It says where that began; if the stored model is finite, training has driven it too far.
            run_model(self.context.mixture.runnable, [window for window, _ in windows], self.context.processes.compute)
        for one in trained:
            one.grad, summed = summed[: one.numel()].view_as(one), summed[one.numel() :]

    def _loss(self, step: int, part: Sequence[tuple[Window, int]], scored: int) -> torch.Tensor:
        """The contribution of one pass to a step's loss, which has `scored` scored tokens in all."""
        windows = [window for window, _ in part]
        with self.context.processes.autocast():
            logits = self.student.logits(windows)
        loss = cross_entropy(windows, logits).sum() / scored
        weight = distillation_weight(step, self.context.settings.steps)
        if self.teachers and weight:
            teachers = [self.teachers[domain] for _, domain in part]
            loss = loss + weight * distillation_loss(windows, logits, teachers).sum() / scored
        return loss

    def _judge(self, state: State) -> str:
        """Judge a state on held-out text and note the result in it; returns it in words, too."""
        try:
            found, _ = judge(self.context, self.student, self.batches.held_out)
        except CheckpointError:  # at the start, losses were finite
            state.without_gain = _PATIENCE
            state.note = f"after step {state.step} losses were not finite, so it ended there: give a lower --lr"
            return state.note
        state.judge(found, self.student.values())
        return (
            f"step {state.step} of {self.context.settings.steps}: held-out loss {found.mean_loss:.4f} (at the start "
            f"{state.before.mean_loss:.4f}, best {state.best.mean_loss:.4f} after step {state.best_step}); "
            f"{state.seconds / state.step:.2f} s per step"
        )
