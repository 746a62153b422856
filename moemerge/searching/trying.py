"""Recipes that are tried on text, without writing a model: their routers, and their losses."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

from moemerge.config.schema import MergeConfig
from moemerge.errors import MoemergeError
from moemerge.evaluation.runnable import Runnable
from moemerge.evaluation.running import run_together
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.planning.plan import MergePlan
from moemerge.planning.planner import plan_merge
from moemerge.progress import Progress, Task
from moemerge.routers.initialisation import Routers, init_routers
from moemerge.routers.request import PassOptions
from moemerge.searching.planned_mixture import LayerReads, planned_model


@dataclass(frozen=True)
class Candidate:
    """A recipe's merge config, and its routers once they are made."""

    number: int
    config: MergeConfig
    routers: Routers | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"trial {self.number}"

    @property
    def base_key(self) -> str:
        """A text that is equal for equal weights of the base model, which routers are made with."""
        config = self.config
        models = [] if config.shared_weights.method == "base" else [expert.source_model for expert in config.experts]
        return repr((config.base_model, config.shared_weights, config.dtype, models))


TEMPORARY: Final = "moemerge-search-"
"""How names of folders begin that are removed when a search ends."""
Failure = str
"""Why a recipe could not be tried."""


class Workers(Protocol):
    """What tries recipes: this process, or several."""

    def make_routers(self, candidates: Sequence[Candidate]) -> list[Routers | Failure]:
        """Make the routers of each candidate."""

    def losses(self, candidates: Sequence[Candidate], windows: Sequence[Window]) -> list[list[float] | Failure]:
        """Compute the losses of each candidate, which has routers, in nats over each window's tokens."""


@dataclass
class Bench:
    """Tries recipes in this process; all candidates of a call pass a layer before any passes the next one."""

    compute: Compute
    options: PassOptions
    """How base models are run for the routers, and where their router inputs and fits are kept."""
    progress: Progress
    plans: dict[int, MergePlan] = field(default_factory=dict)
    """Plans by the number of the candidate."""

    def plan(self, candidate: Candidate) -> MergePlan:
        """Plan a candidate's merge."""
        if candidate.number not in self.plans:
            self.plans[candidate.number] = plan_merge(candidate.config)
        return self.plans[candidate.number]

    def make_routers(self, candidates: Sequence[Candidate]) -> list[Routers | Failure]:
        """Make the routers of each candidate, by the seed of a merge without `--seed`."""
        return [_tried(partial(self._make_routers, candidate)) for candidate in candidates]

    def _make_routers(self, candidate: Candidate) -> Routers:
        named, options = _named(self.progress, candidate.name), self.options
        if candidate.config.method.like_mergekit:  # which reads other states than those that are kept
            options = replace(options, kept_states=None)
        return init_routers(self.plan(candidate).router_request, options, seed=0, progress=named)

    def losses(self, candidates: Sequence[Candidate], windows: Sequence[Window]) -> list[list[float] | Failure]:
        """Compute the losses of each candidate; one whose numbers are not finite fails alone."""
        models = [self.model(candidate, reads) for reads in [LayerReads()] for candidate in candidates]
        report = partial(self.progress, Task("losses", listed(candidates)))
        try:
            found = run_together([(model, windows) for model in models], self.compute, report, alike=True)
        except MoemergeError:
            alone = (partial(run_together, [(model, windows)], self.compute, report) for model in models)
            return [one if isinstance(one := _tried(run), str) else one[0].tolist() for run in alone]
        return [losses.tolist() for losses in found]

    def model(self, candidate: Candidate, reads: LayerReads | None = None) -> Runnable:
        """Make the model of a candidate that has routers."""
        if candidate.routers is None:
            raise ValueError(f"{candidate.name} has no routers yet")
        return planned_model(self.plan(candidate), candidate.routers, candidate.name, reads or LayerReads())


@contextmanager
def bench(compute: Compute, options: PassOptions, progress: Progress, within: Path | None = None) -> Iterator[Bench]:
    """A context with this process as the one worker; what it keeps is removed at the end, but given kept states.

    Args:
        compute: the device and dtype of losses.
        options: how base models are run for the routers.
        progress: called as models are run.
        within: the folder in which it has its own; None for that of all temporary files.
    """
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=within) as folder:
        states = options.kept_states or Path(folder) / "states"
        kept = replace(options, kept_states=states, kept_fits=Path(folder) / "fits", reported=False)
        yield Bench(compute, kept, progress)


_T = TypeVar("_T")


def _tried(work: Callable[[], _T]) -> _T | Failure:
    try:
        return work()
    except MoemergeError as error:
        return str(error)


def _named(progress: Progress, name: str) -> Progress:
    return lambda task, done, total: progress(Task(task.stage, name), done, total)


def listed(candidates: Sequence[Candidate]) -> str:
    """Name candidates in messages."""
    numbers = [str(candidate.number) for candidate in candidates]
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
