"""The story of a search: recipes are proposed and tried, and the best one is judged on text that was held out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moemerge.config.problems import PlacedError
from moemerge.config.recipe import Recipe, load_recipe
from moemerge.evaluation.evaluator import read_domains
from moemerge.planning.plan import MergePlan
from moemerge.planning.planner import plan_merge
from moemerge.progress import Progress
from moemerge.routers.kept_folder import check_kept_states
from moemerge.searching.dividing import divide
from moemerge.searching.results import SearchResult
from moemerge.searching.sampling import InTurn, Sampler, Tpe, all_recipes
from moemerge.searching.settings import TOGETHER, SearchSettings


def search(
    recipe: Path | str,
    data: Mapping[str, Sequence[str]],
    settings: SearchSettings = SearchSettings(),
    *,
    test: Mapping[str, Sequence[str]] | None = None,
    progress: Progress = lambda _task, _done, _total: None,
    announce: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    """Try recipes without writing a model, and choose the best.

    Args:
        recipe: the path of a merge config in which values may be choices or ranges.
        data: files, folders or patterns of documents, or data sets on the Hub, by the name of their domain. Every
            second document is held out.
        settings: how many recipes are tried, by what they are judged, and on how much text.
        test: documents by domain that are held out in place of documents in `data`.
        progress: called as models are run.
        announce: called with a line about each step that takes long, and each recipe that was tried.

    Raises:
        ConfigError: the recipe is wrong; lists every problem.
        RefusedError: there is too little text, or Optuna is needed and not installed.
        IncompatibleError: no recipe could be tried.
        SourceError, CheckpointError, RouterError: see `plan_merge` and `evaluate`.
    """
    loaded = load_recipe(Path(recipe))
    if settings.kept_states is not None:
        check_kept_states(settings.kept_states)
    sampler = _sampler(loaded, settings)
    plan = _first_plan(loaded, announce)
    parts = divide(read_domains(data), read_domains(test or {}, "--test"), settings.seed)
    from moemerge.searching.tried_search import run  # imports torch and transformers

    return run(loaded, plan, sampler, parts, settings, progress, announce)


def _first_plan(recipe: Recipe, announce: Callable[[str], None]) -> MergePlan:
    """Plan the merge of all first options, which have to fit together."""
    made = recipe.first()
    try:
        return plan_merge(recipe.config(made), announce=announce)
    except PlacedError as error:
        raise recipe.refusal(made, error.placed) from error


def _sampler(recipe: Recipe, settings: SearchSettings) -> Sampler:
    """All recipes in turn, if they are no more than are to be tried; else Optuna's."""
    everything = all_recipes(recipe, settings.trials)
    if everything is not None:
        return InTurn(everything)
    return Tpe(recipe, seed=settings.seed, costs=1 if settings.cost is None else 2, random=TOGETHER)
