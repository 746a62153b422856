"""Which windows of text a step reads: of every domain alike, in an order that the seed and the step alone decide."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moemerge.evaluation.measuring import Texts
from moemerge.evaluation.runnable import MixtureModel
from moemerge.passes.tokens import Window
from moemerge.tuning.settings import Settings, distillation_weight

_LONGEST: Final = 512
_SHORTEST: Final = 16
# Tokens that judge a state, as steps.
_HELD_OUT_STEPS: Final = 8


@dataclass(frozen=True)
class Batches:
    """Windows to train on and to judge by."""

    training: Texts
    held_out: Texts
    settings: Settings
    per_domain: int
    """Windows of a domain in a step."""

    @classmethod
    def cut(
        cls, mixture: MixtureModel, training: Mapping[str, Sequence[str]], held_out: Mapping[str, Sequence[str]],
        settings: Settings,
    ) -> "Batches":  # fmt: skip
        """Divide documents into windows so that a step holds some of every domain.

        Raises:
            RouterError: there is no tokenizer.
            RefusedError: a domain has nothing to predict.
        """
        share = max(settings.tokens_per_step // len(training), _SHORTEST)
        length = min(share, _LONGEST)
        return cls(
            Texts.cut(mixture, training, settings.steps * share, length),
            Texts.cut(mixture, held_out, _HELD_OUT_STEPS * share, length), settings, share // length,
        )  # fmt: skip

    @property
    def windows_per_step(self) -> int:
        """Of all domains."""
        return self.per_domain * len(self.training.domains)

    def taught(self, domain: int) -> list[Window]:
        """Windows of a domain that steps with distillation read."""
        steps = [step for step in range(self.settings.steps) if distillation_weight(step, self.settings.steps)]
        return list(dict.fromkeys(window for step in steps for window, _ in self.step(step, [domain])))

    def step(self, step: int, domains: Sequence[int] | None = None) -> list[tuple[Window, int]]:
        """Windows of a step, each with its domain's place; when all were read they come again, in another order."""
        found = []
        for domain in range(len(self.training.domains)) if domains is None else domains:
            mine = self.training.of(domain)
            for place in range(step * self.per_domain, (step + 1) * self.per_domain):
                again, index = divmod(place, len(mine))
                order = mine.copy()
                random.Random(f"{self.settings.seed}:{domain}:{again}").shuffle(order)  # noqa: S311  no secret
                found.append((self.training.windows[order[index]], domain))
        return found
