"""Choose the windows of text of each step: as many of every domain, in an order that depends on the seed alone."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

from moemerge.errors import RefusedError
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.tokens import Window
from moemerge.tuning.settings import Settings, SplitDocuments, distillation_weight

_LONGEST: Final = 512
_SHORTEST: Final = 16
# Tokens that judge a state, counted in steps.
_HELD_OUT_STEPS: Final = 8


@dataclass(frozen=True)
class Batches:
    """Windows to train on and to judge by."""

    training: Texts
    held_out: Texts
    steps: tuple[tuple[int, ...], ...]
    """The windows of `training` that each step reads, one of every domain in turn."""

    @classmethod
    def cut(cls, mixture: MixtureModel, documents: SplitDocuments, settings: Settings) -> "Batches":
        """Divide documents into windows, and these into steps that hold some of every domain.

        Raises:
            RouterError: there is no tokenizer.
            RefusedError: a domain has nothing to predict, or too little in a step.
        """
        training = documents.training
        share = settings.tokens_per_step // len(training)
        if share < _SHORTEST:
            raise RefusedError(
                f"--tokens-per-step: expected {_SHORTEST} or more for each of {len(training)} domains, so at least "
                f"{_SHORTEST * len(training)}, found {settings.tokens_per_step}."
            )
        length = math.ceil(share / math.ceil(share / _LONGEST))
        texts = Texts.cut(mixture, training, settings.steps * share, length, settings.roles)
        domains = [
            _fill(texts, domain, share, f"{settings.seed}:{domain}", settings.steps) for domain in range(len(training))
        ]
        steps = tuple(
            tuple(window for turn in zip_longest(*of_domain) for window in turn if window is not None)
            for of_domain in zip(*domains, strict=True)
        )
        held = Texts.cut(mixture, documents.held_out, _HELD_OUT_STEPS * share, length, settings.roles)
        return cls(texts, held, steps)

    def step(self, step: int) -> list[tuple[Window, int]]:
        """The windows of a step, each with the number of its domain."""
        return [(self.training.windows[place], self.training.domain[place]) for place in self.steps[step]]

    def taught(self, domain: int) -> list[Window]:
        """The windows of a domain that steps with distillation read."""
        steps = [step for step in range(len(self.steps)) if distillation_weight(step, len(self.steps))]
        return list(dict.fromkeys(window for step in steps for window, of in self.step(step) if of == domain))


def _fill(texts: Texts, domain: int, share: int, seed: str, steps: int) -> list[list[int]]:
    """Choose a domain's windows for each step: its share of the tokens of all steps so far, and one window at least."""
    windows, read, filled = _shuffled(texts.of(domain), seed), 0, []
    for step in range(1, steps + 1):
        mine: list[int] = []
        while not mine or read < step * share:
            mine.append(next(windows))
            read += len(texts.windows[mine[-1]].ids)
        filled.append(mine)
    return filled


def _shuffled(places: Sequence[int], seed: str) -> Iterator[int]:
    """Yield the places in random order; when all were given they come again, in another order."""
    turn = 0
    while True:
        order = list(places)
        random.Random(f"{seed}:{turn}").shuffle(order)  # noqa: S311  no secret
        yield from order
        turn += 1
