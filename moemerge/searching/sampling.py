"""Which recipes are tried next: all there are, or by Optuna's TPE."""

import warnings
from collections.abc import Iterator
from typing import Any, Final, Protocol

from moemerge.config.recipe import Made, Recipe, first_of
from moemerge.config.recipe_points import Choice, Point
from moemerge.errors import ConfigError
from moemerge.packages import importing
from moemerge.places import address
from moemerge.searching.halving import Score

# Options go together in too many ways to look at all of them.
_MOST_LOOKED_AT: Final = 10_000
_NEEDED: Final = (
    "to choose recipes, optuna is needed: pip install 'moemerge[search]'. Without it, a search tries all recipes, "
    "where there are no more than --trials, and the recipe has no ranges."
)


class Sampler(Protocol):
    """A source of recipes to try."""

    def ask(self) -> tuple[int, Made] | None:
        """Give a number and the document of a recipe, which may be an earlier one; None where there are no more."""

    def tell(self, number: int, score: Score | None, stopped: int | None = None) -> None:
        """Say how good a recipe was; None for one that was not tried, or failed.

        One that was stopped after so many rounds is worse than those that went on, whatever its score.
        """


class InTurn:
    """A sampler of given recipes, in their order."""

    def __init__(self, recipes: list[Made]) -> None:
        self._left = iter(enumerate(recipes))

    def ask(self) -> tuple[int, Made] | None:
        """Give the next recipe."""
        return next(self._left, None)

    def tell(self, number: int, score: Score | None, stopped: int | None = None) -> None:
        """Do nothing: the order is given."""


class Tpe:
    """A sampler by the Tree-structured Parzen Estimator (Bergstra et al. 2011), as Optuna has it.

    The first recipe has all first options.
    """

    def __init__(self, recipe: Recipe, *, seed: int, costs: int, random: int) -> None:
        """Begin.

        Args:
            recipe: the recipe.
            seed: the seed of the sampler.
            costs: how many numbers of a score count, 1 or 2.
            random: how many recipes are drawn at random first.

        Raises:
            RefusedError: Optuna is not installed, or lacks something.
        """
        with importing("optuna", _NEEDED):
            import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._recipe, self._costs = recipe, costs
        with warnings.catch_warnings():  # that an option may change in later versions
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=random, constant_liar=True)
        self._study = optuna.create_study(directions=["minimize"] * costs, sampler=sampler)
        self._study.enqueue_trial({address(point.place): first_of(point) for point in recipe.first().asked})
        self._states = optuna.trial.TrialState
        self._trials: dict[int, Any] = {}

    def ask(self) -> tuple[int, Made] | None:
        """Give the next recipe."""
        trial = self._study.ask()
        self._trials[trial.number] = trial

        def suggested(point: Point) -> float:
            name = address(point.place)
            if isinstance(point, Choice):
                found: float = trial.suggest_categorical(name, range(len(point.options)))
            elif point.whole:
                found = trial.suggest_int(name, int(point.low), int(point.high), log=point.log)
            else:
                found = trial.suggest_float(name, point.low, point.high, log=point.log)
            return found

        return trial.number, self._recipe.make(suggested)

    def tell(self, number: int, score: Score | None, stopped: int | None = None) -> None:
        """Say how good a recipe was; Optuna ranks stopped ones below all others, by their rounds."""
        trial, states = self._trials.pop(number), self._states
        if score is None:
            self._study.tell(trial, state=states.FAIL)
        elif stopped is None:
            self._study.tell(trial, list(score[: self._costs]))
        else:
            if self._costs == 1:  # of two, Optuna takes no values of a part
                trial.report(score[0], stopped)
            self._study.tell(trial, state=states.PRUNED)


def all_recipes(recipe: Recipe, most: int) -> list[Made] | None:
    """List the recipes that are valid merges, each once, the first options first; None if they are more than `most`."""
    found: dict[str, Made] = {}
    for looked_at, made in enumerate(_combinations(recipe)):
        if made is None or looked_at == _MOST_LOOKED_AT:
            return None
        if made.key not in found and is_valid(recipe, made):
            found[made.key] = made
        if len(found) > most:
            return None
    return list(found.values())


def is_valid(recipe: Recipe, made: Made) -> bool:
    """Whether a document's values go together."""
    try:
        recipe.config(made)
    except ConfigError:
        return False
    return True


class _EndlessError(Exception):
    """There is a range, of which there is no end of numbers."""


def _combinations(recipe: Recipe) -> Iterator[Made | None]:
    """Yield the documents of all options with each other; None where there is a range."""
    path: list[int] = []
    while True:
        taken: list[tuple[int, int]] = []

        def ask(point: Point, taken: list[tuple[int, int]] = taken, path: list[int] = path) -> float:
            if not isinstance(point, Choice):
                raise _EndlessError
            taken.append((path[len(taken)] if len(taken) < len(path) else 0, len(point.options)))
            return taken[-1][0]

        try:
            yield recipe.make(ask)
        except _EndlessError:
            yield None
            return
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        path = [number for number, _ in taken]
        path[-1] += 1
