"""A search once its recipe is read: recipes are tried, and the best one is judged on text that was held out."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from moemerge.config.recipe import Recipe
from moemerge.errors import IncompatibleError
from moemerge.evaluation.domain_texts import TextReader
from moemerge.evaluation.figures import difference, estimate
from moemerge.evaluation.kept_losses import KeptLosses
from moemerge.evaluation.running import run_together
from moemerge.passes.compute_dtype import find_compute
from moemerge.planning.plan import MergePlan
from moemerge.progress import Progress, Task
from moemerge.routers.request import PassOptions
from moemerge.searching.dividing import Documents
from moemerge.searching.halving import front, winner
from moemerge.searching.judging import Judge
from moemerge.searching.planned_mixture import LayerReads
from moemerge.searching.references import DenseModels, References, sums_by_domain
from moemerge.searching.results import HeldOut, SearchResult
from moemerge.searching.sampling import Sampler
from moemerge.searching.settings import SearchSettings
from moemerge.searching.texts import SearchTexts
from moemerge.searching.trials import Trials
from moemerge.searching.trying import Bench, Workers, bench


def run(  # noqa: PLR0917
    recipe: Recipe,
    plan: MergePlan,
    sampler: Sampler,
    parts: tuple[Documents, Documents],
    settings: SearchSettings,
    progress: Progress,
    announce: Callable[[str], None],
) -> SearchResult:
    """Search as `moemerge.searching.searcher.search` does.

    `plan` is that of all first options, and `parts` are documents to search by, and those held out.
    """
    length = min(settings.window, int(plan.base.config["max_position_embeddings"]) - 1)
    reader = TextReader(plan.base_folder, plan.config.expert_names, settings.tokens, length, settings.roles)
    texts = SearchTexts.read_by(reader, *parts)
    compute = find_compute(settings.device, settings.compute_dtype, plan.parts.base.layer_shapes)
    dense = DenseModels.open(plan, texts.searched, announce)
    references = References(dense, compute, KeptLosses(settings.kept_losses, compute), progress)
    options = PassOptions(settings.device, settings.compute_dtype, kept_states=settings.kept_states)
    with bench(compute, options, progress) as here, _workers(here, settings, options) as workers:
        judge = Judge(texts, references.losses(texts.searched), settings)
        trials = Trials(recipe, sampler, judge, here, announce)
        trials.run(workers)
        return _result(trials, references, progress)


def _workers(here: Bench, settings: SearchSettings, options: PassOptions) -> AbstractContextManager[Workers]:
    """A context with what tries recipes: this process, or those of a Ray cluster."""
    if settings.ray is None:
        return nullcontext(here)
    from moemerge.searching.ray_workers import ray_workers  # imports Ray, an extra

    return ray_workers(settings.ray, settings.workers, here.compute, options, here.progress)


def _result(trials: Trials, references: References, progress: Progress) -> SearchResult:
    """Choose the best recipe, and run it over the held-out text."""
    settings, scores = trials.judge.settings, trials.complete()
    if not scores:
        failures = dict.fromkeys(trial.failure for trial in trials.trials.values())
        raise IncompatibleError(f"{trials.recipe.name}: none of its merges could be tried:", list(failures))
    chosen = winner(scores)
    return SearchResult(
        recipe=trials.recipe.name,
        objective=settings.objective,
        cost=settings.cost,
        seed=settings.seed,
        dtype=references.compute.dtype_name,
        dense=dict(zip(trials.judge.texts.searched.domains, references.dense.names, strict=True)),
        trials=trials.beside(chosen),
        chosen=chosen,
        front=tuple(front(scores)) if settings.cost else (chosen,),
        config=trials.candidates[chosen].config,
        held_out=_held_out(trials, chosen, references, progress),
    )


def _held_out(trials: Trials, chosen: int, references: References, progress: Progress) -> HeldOut:
    """Run the chosen recipe, and the recipe's first options beside it, over the held-out text."""
    texts, reads = trials.judge.texts.held_out, LayerReads()
    compared = [chosen, *([0] if chosen and trials.candidates[0].routers else [])]
    models = [trials.bench.model(trials.candidates[number], reads) for number in compared]

    def report(done: int, total: int) -> None:
        progress(Task("losses", "held-out text"), done, total)

    found = run_together([(model, texts.windows) for model in models], references.compute, report, alike=True)
    own, *others = (sums_by_domain(texts, dict(enumerate(losses.tolist()))) for losses in found)
    dense = sums_by_domain(texts, references.losses(texts))
    losses = {name: estimate(sums) for name, sums in own.items()}
    return HeldOut(
        documents={name: len(sums) for name, sums in own.items()},
        losses=losses,
        mean=sum(loss.value for loss in losses.values()) / len(losses),
        dense={name: estimate(sums).value for name, sums in dense.items()},
        against_dense=difference(own, dense),
        against_first=difference(own, others[0]) if others else None,
    )
