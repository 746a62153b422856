"""How good a recipe is, by its losses on the text that it was tried on."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from moemerge.searching.halving import Score
from moemerge.searching.settings import SearchSettings
from moemerge.searching.texts import SearchTexts

# Further digits of a loss differ between machines and numbers of threads, and would change what is chosen.
_DIGITS: Final = 5


@dataclass(frozen=True)
class Judged:
    """A recipe's losses on some text."""

    loss: float
    """Mean over domains in nats per token."""
    worst: float
    """The most that it is above its dense model on a domain."""
    by_domain: Mapping[str, float]


@dataclass(frozen=True)
class Judge:
    """Compares recipes beside the dense models, which have run over all text."""

    texts: SearchTexts
    dense: Mapping[int, float]
    """The loss of each window's dense model, by the window's number."""
    settings: SearchSettings

    def judge(self, losses: Mapping[int, float], rounds: int | None = None) -> Judged:
        """Judge a recipe by its losses of windows, of all that it was tried on or of the first rounds alone."""
        used = self.texts.rounds[:rounds]
        seen = {window: losses[window] for part in used for window in part if window in losses}
        own = self.texts.by_domain(seen)
        beside = self.texts.by_domain({window: self.dense[window] for window in seen})
        worst = max(mine - theirs for mine, theirs in zip(own, beside, strict=True))
        return Judged(fmean(own), worst, dict(zip(self.texts.searched.domains, own, strict=True)))

    def score(self, judged: Judged, cost: int) -> Score:
        """Give what is to be small of a recipe; where costs do not count, the second number is 0."""
        objective = judged.loss if self.settings.objective == "mean" else judged.worst
        return round(objective, _DIGITS), float(cost if self.settings.cost else 0)
