"""Run the models of an evaluation one after the other over the same windows of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moemerge.chats import Document
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import MoemergeError
from moemerge.evaluation.baselines import average, forced, uniform
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import (
    BASE,
    EXPERT,
    MERGED,
    ORACLE,
    SOUP,
    UNEDITED,
    UNIFORM,
    Domain,
    Evaluation,
    Sums,
    difference,
    estimate,
    no_better,
    recovered,
)
from moemerge.evaluation.kept_losses import KeptLosses
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.processes import processes_of
from moemerge.evaluation.runnable import MixtureModel, Runnable, open_dense, open_mixture
from moemerge.evaluation.seen_text import seen_text_notes
from moemerge.evaluation.settings import EvaluationSettings
from moemerge.file_kinds import Kind, what_is
from moemerge.passes.compute_dtype import find_compute
from moemerge.progress import Progress
from moemerge.sources.model_folder import open_merged
from moemerge.sources.reference import split_expert
from moemerge.sources.stored_mixtures import is_mixture, names_itself


def measure(
    folder: Path | str,
    documents: Mapping[str, Sequence[Document]],
    settings: EvaluationSettings,
    progress: Progress,
    announce: Callable[[str], None],
) -> tuple[Evaluation, Mapping[str, Sums]]:
    """Evaluate as `moemerge.evaluation.evaluator.evaluate` does; `documents` are by domain.

    Returns:
        The evaluation, and the merged model's losses by document, for each domain.
    """
    mixture, baselines = open_mixture(folder, in_stores=True), settings.baselines
    compute = find_compute(settings.device, settings.compute_dtype, mixture.runnable.layer_shapes)
    texts = Texts.cut(mixture, documents, settings.tokens, settings.window, settings.roles)
    dense, notes = _dense_models(mixture, announce)
    judged = sum(expert is not None for expert in texts.expert)
    planned = 1 + len(dense) + (2 + judged) * baselines
    kept = KeptLosses(settings.kept_losses, compute, replace=settings.rerun)
    routing = RoutingTally(mixture, texts)
    with processes_of(settings.ray, settings.workers, compute, len(texts.windows)) as processes:
        runs = Runs(texts, compute, progress, kept, planned, processes)
        runs.run(MERGED, mixture.runnable, mixture=mixture, tally=routing)
        notes += [note for model in dense if (note := _try(runs, model.name, model))]
        if baselines:
            experts = [model for model in dense if model.name.startswith(EXPERT)]
            made = {UNIFORM: uniform(mixture), SOUP: average(SOUP, experts) if experts else ""}
            for name, baseline in made.items():
                notes.append(_try(runs, name, baseline) if isinstance(baseline, Runnable) else baseline)
            _run_oracle(runs, mixture, texts, notes)
    notes += seen_text_notes(mixture.config, documents)
    found = _evaluation(folder, mixture, texts, runs, routing, list(filter(None, notes)))
    return found, runs.sums[MERGED]


def _dense_models(mixture: MixtureModel, announce: Callable[[str], None]) -> tuple[list[Runnable], list[str]]:
    """Open the base and every expert that is still there, with notes; without the base none is opened."""
    if mixture.config is None:
        return [], [f"{mixture.folder} does not say what it was merged from: base and experts are left out"]
    itself = names_itself(mixture.config, mixture.folder)
    notes = [f"{mixture.folder} was edited in place: what it was before is left out"] if itself else []
    base = [] if itself else _unedited(mixture.config.base_model)
    named = [] if base or itself else [(mixture.config.base_model, BASE)]
    experts = zip(mixture.config.experts, mixture.config.expert_names, strict=True)
    named += [(e.source_model, f"{EXPERT}{name}") for e, name in experts if e.by_layer is None]  # one model in all
    try:
        return base + [open_dense(reference, name, announce, ids_of=mixture.ids_of) for reference, name in named], notes
    except MoemergeError as error:
        why = f"{error} Paths in its {CONFIG_COPY} count from its folder, else from the current one."
        return [], [f"base, experts and their average are left out: {why}"]


def _unedited(base: str) -> list[Runnable]:
    """Open the mixture that an edited one was made from, if its base is one in a folder here."""
    if split_expert(base) or what_is(Path(base)) is not Kind.MODEL or not is_mixture(open_merged(base)):
        return []
    return [replace(open_mixture(base).runnable, name=UNEDITED)]


def _try(runs: Runs, name: str, model: Runnable, domain: int | None = None) -> str:
    """Run a model that may fail, such as one whose vocabulary lacks a token; returns the reason, or an empty text.

    Args:
        runs: keeps its losses.
        name: the name that they are kept under.
        model: the model to run.
        domain: the domain to run it over, or None for all.
    """
    try:
        runs.run(name, model, domains=None if domain is None else [domain])
    except MoemergeError as error:
        what = name if domain is None else f"{name} of {runs.texts.domains[domain]}"
        return f"{what} is left out: {str(error).removeprefix(f'{model.name}: ').removesuffix('.')}"
    return ""


def _run_oracle(runs: Runs, mixture: MixtureModel, texts: Texts, notes: list[str]) -> None:
    """Run each domain that has an expert with all its tokens through that expert."""
    for domain, expert in enumerate(texts.expert):
        if expert is None:
            notes.append(f"{texts.domains[domain]} is not an expert's name, so there is no oracle for it")
        elif any(expert in mixture.absent(layer) for layer in mixture.moe_layers):
            notes.append(f"{mixture.experts[expert]} is absent from some layers, so there is no oracle for it")
        else:
            notes.append(_try(runs, ORACLE, forced(mixture, expert), domain))


def _evaluation(  # noqa: PLR0917
    folder: Path | str,
    mixture: MixtureModel,
    texts: Texts,
    runs: Runs,
    routing: RoutingTally,
    notes: list[str],
) -> Evaluation:
    sums = runs.sums
    domains = tuple(
        Domain(
            name,
            texts.expert[place],
            len(sums[MERGED][name]),
            texts.documents[place],
            int(sums[MERGED][name][:, 1].sum()),
        )
        for place, name in enumerate(texts.domains)
    )
    losses = {model: {name: estimate(found) for name, found in of.items()} for model, of in sums.items()}
    judged = [domain.name for domain in domains if domain.name in sums.get(ORACLE, {}) and UNIFORM in sums]
    by_domain = {name: found for name in judged if (found := recovered(sums, [name]))}
    notes += [
        f"choosing experts gains nothing on {name}: the oracle is no better than the uniform mixture"
        for name in judged
        if name not in by_domain
    ]
    return Evaluation(
        model=str(folder),
        experts=mixture.experts,
        experts_per_token=mixture.experts_per_token,
        layers=tuple(mixture.moe_layers),
        dtype=runs.compute.dtype_name,
        domains=domains,
        losses=losses,
        mean_losses={
            model: math.fsum(found.value for found in of.values()) / len(of)
            for model, of in losses.items()
            if len(of) == len(domains)
        },
        differences={
            model: difference(sums[MERGED], of)
            for model, of in sums.items()
            if model != MERGED and len(of) == len(domains)
        },
        recovered=by_domain,
        recovered_mean=recovered(sums, judged) if judged else None,
        routing={name: routing.of(place) for place, name in enumerate(texts.domains)},
        notes=(*notes, *no_better(losses, domains)),
    )
