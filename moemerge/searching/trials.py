"""Recipes that are proposed and tried on growing text, several at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from moemerge.config.recipe import Made, Recipe
from moemerge.errors import MoemergeError
from moemerge.routers.initialisation import Routers
from moemerge.searching.halving import Score, best_third
from moemerge.searching.judging import Judge, Judged
from moemerge.searching.results import Trial
from moemerge.searching.sampling import Sampler, is_valid
from moemerge.searching.settings import TOGETHER
from moemerge.searching.trying import Bench, Candidate, Failure, Workers

# Proposals for each recipe that is wanted: some were made before, and some are no valid merge.
_ATTEMPTS: Final = 25


@dataclass
class Trials:
    """All recipes that were tried so far."""

    recipe: Recipe
    sampler: Sampler
    judge: Judge
    bench: Bench
    """Plans recipes, in this process."""
    announce: Callable[[str], None]
    trials: dict[int, Trial] = field(default_factory=dict)
    candidates: dict[int, Candidate] = field(default_factory=dict)
    _losses: dict[int, dict[int, float]] = field(default_factory=dict)
    _rounds: dict[int, int] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)

    def run(self, workers: Workers) -> None:
        """Propose recipes and try them, until there are enough or no more new ones."""
        while left := self.judge.settings.trials - len(self.trials):
            proposed = self._propose(min(left, TOGETHER))
            if not proposed:
                return
            self._try(workers, list(proposed))
            for number, asked in proposed.items():
                trial = self.trials[number]
                stopped = None if trial.complete else self._rounds[number]
                self.sampler.tell(asked, None if trial.failure else self._score(number), stopped)
                self.announce(_line(trial))

    def complete(self) -> dict[int, Score]:
        """The scores of the recipes that were tried on all text."""
        return {number: self._score(number) for number, trial in self.trials.items() if trial.complete}

    def beside(self, chosen: int) -> tuple[Trial, ...]:
        """All trials; the loss of one that was stopped is the chosen one's, and what it was above that until then."""
        whole = self._judged(chosen).loss
        found = []
        for number, trial in self.trials.items():
            stopped = trial.loss is not None and not trial.complete
            above = self._judged(number).loss - self._judged(chosen, self._rounds[number]).loss if stopped else 0.0
            found.append(replace(trial, loss=whole + above) if stopped else trial)
        return tuple(found)

    def _propose(self, count: int) -> dict[int, int]:
        """Propose recipes that are new; returns what the sampler calls them, by their numbers."""
        proposed: dict[int, int] = {}
        for _ in range(count * _ATTEMPTS):
            asked = self.sampler.ask() if len(proposed) < count else None
            if asked is None:
                break
            if asked[1].key in self._known or not is_valid(self.recipe, asked[1]):
                self.sampler.tell(asked[0], None)
            else:
                proposed[self._add(asked[1])] = asked[0]
        return proposed

    def _add(self, made: Made) -> int:
        number = len(self.trials)
        self._known.add(made.key)
        self.trials[number] = Trial(number, made.values)
        self.candidates[number] = Candidate(number, self.recipe.config(made))
        self._losses[number], self._rounds[number] = {}, 0
        return number

    def _try(self, workers: Workers, numbers: Sequence[int]) -> None:
        """Make the routers of some recipes, and try them on growing text as long as they are among the best."""
        going = self._made([number for number in numbers if self._is_planned(number)], workers)
        for step in range(len(self.judge.texts.rounds)):
            if not going:
                return
            tried = workers.losses([self.candidates[number] for number in going], self.judge.texts.windows(step))
            for number, losses in zip(going, tried, strict=True):
                self._count(number, step, losses)
            reached = [number for number, rounds in self._rounds.items() if rounds > step]
            best = best_third({number: self._score(number, step + 1) for number in reached})
            going = [number for number in going if number in best]

    def _is_planned(self, number: int) -> bool:
        """Plan a recipe's merge, and note what it costs, or that it cannot be made."""
        try:
            plan = self.bench.plan(self.candidates[number])
        except MoemergeError as error:
            self._fail(number, str(error))
            return False
        size, active = plan.tensor_bytes, plan.active_parameters
        self.trials[number] = replace(self.trials[number], weight_bytes=size, active_parameters=active)
        return True

    def _made(self, numbers: Sequence[int], workers: Workers) -> list[int]:
        """Make routers; returns the numbers of the recipes that have some now."""
        made = workers.make_routers([self.candidates[number] for number in numbers])
        for number, routers in zip(numbers, made, strict=True):
            if isinstance(routers, Routers):
                self.candidates[number] = replace(self.candidates[number], routers=routers)
            else:
                self._fail(number, routers)
        return [number for number in numbers if not self.trials[number].failure]

    def _count(self, number: int, step: int, losses: Sequence[float] | Failure) -> None:
        """Note what a recipe lost in a round."""
        if isinstance(losses, str):
            self._fail(number, losses)
            return
        texts = self.judge.texts
        self._losses[number] |= dict(zip(texts.rounds[step], losses, strict=True))
        self._rounds[number] = step + 1
        judged = self._judged(number)
        self.trials[number] = replace(
            self.trials[number],
            tokens=texts.tokens(step + 1),
            complete=step + 1 == len(texts.rounds),
            loss=judged.loss,
            worst=judged.worst,
            losses=judged.by_domain,
        )

    def _fail(self, number: int, why: str) -> None:
        self.trials[number] = Trial(number, self.trials[number].values, failure=why)
        self._rounds[number] = 0

    def _judged(self, number: int, rounds: int | None = None) -> Judged:
        return self.judge.judge(self._losses[number], rounds)

    def _score(self, number: int, rounds: int | None = None) -> Score:
        trial = self.trials[number]
        cost = trial.weight_bytes if self.judge.settings.cost == "bytes" else trial.active_parameters
        return self.judge.score(self._judged(number, rounds), cost)


def shown(values: Mapping[str, str]) -> str:
    """The values of a recipe in one line."""
    return ", ".join(f"{place}: {value}" for place, value in values.items())


def _line(trial: Trial) -> str:
    """Say in a line how a recipe did."""
    what = f"trial {trial.number} ({shown(trial.values)})"
    if trial.loss is None:
        return f"{what} cannot be tried: {trial.failure}"
    where = f"all {trial.tokens} tokens" if trial.complete else f"the first {trial.tokens} tokens, where it was stopped"
    return f"{what}: {trial.loss:.4f} nats per token on {where}"
