"""Run the models of an evaluation one after the other over the same windows of text."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch

from moemerge.chats import COUNTED_ROLES, Document
from moemerge.config.schema import CONFIG_COPY
from moemerge.dtypes import ComputeDtype
from moemerge.errors import MoemergeError, RefusedError
from moemerge.evaluation.figures import (
    BASE,
    MERGED,
    ORACLE,
    SOUP,
    UNIFORM,
    Domain,
    Evaluation,
    Routing,
    Sums,
    by_document,
    estimate,
    no_better,
    recovered,
)
from moemerge.evaluation.runnable import MixtureModel, Runnable, average, forced, open_dense, open_mixture, uniform
from moemerge.evaluation.running import Choice, run_model
from moemerge.passes.compute_dtype import Compute, find_compute
from moemerge.passes.tokens import Window, by_transformers, cut_windows
from moemerge.routers.scoring import shares


def measure(
    folder: Path | str,
    documents: Mapping[str, Sequence[Document]],
    *,
    baselines: bool,
    tokens: int,
    window: int,
    roles: Sequence[str],
    device: str,
    compute_dtype: ComputeDtype,
    progress: Callable[[str, int, int], None],
    announce: Callable[[str], None],
) -> Evaluation:
    """Evaluate as `moemerge.evaluation.evaluator.evaluate` does; `documents` are by domain."""
    mixture = open_mixture(folder)
    compute = find_compute(device, compute_dtype, mixture.runnable.layer_shapes)
    texts = Texts.cut(mixture, documents, tokens, window, roles)
    runs = Runs(texts, compute, progress)
    routing = RoutingTally(mixture, texts)
    runs.run(MERGED, mixture.runnable, mixture=mixture, chosen=routing.add)
    dense, notes = _dense_models(mixture, announce)
    notes += [note for model in dense if (note := _try(runs, model.name, model))]
    if baselines:
        made = {UNIFORM: uniform(mixture), SOUP: average(SOUP, dense[1:]) if dense else ""}
        for name, baseline in made.items():
            notes.append(_try(runs, name, baseline) if isinstance(baseline, Runnable) else baseline)
        _run_oracle(runs, mixture, texts, notes)
    return _evaluation(folder, mixture, texts, runs, routing, list(filter(None, notes)))


@dataclass(frozen=True)
class Texts:
    """Windows of every domain, in one list."""

    domains: tuple[str, ...]
    expert: tuple[int | None, ...]
    """The expert with the name of each domain; None without one."""
    documents: tuple[int, ...]
    """Number of documents in each domain."""
    windows: tuple[Window, ...]
    domain: tuple[int, ...]
    """Number of the domain of each window."""

    @classmethod
    def cut(
        cls,
        mixture: MixtureModel,
        documents: Mapping[str, Sequence[Document]],
        tokens: int,
        window: int,
        roles: Sequence[str] = COUNTED_ROLES,
    ) -> "Texts":
        """Read each domain's documents with the mixture's tokenizer.

        Raises:
            RouterError: there is no tokenizer.
            RefusedError: a domain's name is nearly that of an expert, or it has nothing to predict.
        """
        _check_names(documents, mixture.experts)
        encode = by_transformers(mixture.folder, roles=roles)
        context = mixture.runnable.keys.get("max_position_embeddings", window + 1)
        length = min(window, context - 1)
        cut = [
            [window for window in cut_windows(texts, encode, tokens=tokens, length=length) if any(window.scored)]
            for texts in documents.values()
        ]
        for name, windows in zip(documents, cut, strict=True):
            if not windows:
                raise RefusedError(f"--data {name}=: its documents have no token that another one precedes.")
        experts = [mixture.experts.index(name) if name in mixture.experts else None for name in documents]
        return cls(
            tuple(documents),
            tuple(experts),
            tuple(map(len, documents.values())),
            tuple(window for part in cut for window in part),
            tuple(place for place, part in enumerate(cut) for _ in part),
        )

    def of(self, domain: int) -> list[int]:
        """Numbers of the windows of a domain."""
        return [window for window, place in enumerate(self.domain) if place == domain]

    def sums(self, losses: torch.Tensor, windows: Sequence[int]) -> Sums:
        """Sum losses (window of `windows`,) by document."""
        of = [self.windows[window] for window in windows]
        return by_document(losses.tolist(), [sum(window.scored) for window in of], [window.document for window in of])


def _check_names(names: Collection[str], experts: Sequence[str]) -> None:
    """Refuse a misspelt expert's name, whose text would otherwise count as nobody's."""
    by_lower = {expert.lower(): expert for expert in reversed(experts)}
    for name in names:
        if name not in experts and (near := get_close_matches(name.lower(), by_lower, n=1)):
            raise RefusedError(
                f"--data {name}=: is not an expert's name, did you mean {by_lower[near[0]]}? Experts: "
                f"{', '.join(experts)}. A domain that is for none of them needs a name that is less like theirs."
            )


@dataclass
class Runs:
    """Runs models over the texts and keeps their losses by model and domain."""

    texts: Texts
    compute: Compute
    progress: Callable[[str, int, int], None]
    sums: dict[str, dict[str, Sums]] = field(default_factory=dict)

    def run(
        self,
        name: str,
        model: Runnable,
        *,
        domains: Sequence[int] | None = None,
        mixture: MixtureModel | None = None,
        chosen: Callable[[Choice], None] = lambda _: None,
    ) -> None:
        """Run a model over all domains or some, and keep its losses by document under a name; see `run_model`."""
        domains = range(len(self.texts.domains)) if domains is None else domains
        places = [window for domain in domains for window in self.texts.of(domain)]
        losses = run_model(
            model,
            [self.texts.windows[window] for window in places],
            self.compute,
            mixture=mixture,
            chosen=chosen,
            progress=lambda done, total: self.progress(name, done, total),
        )
        of_model = self.sums.setdefault(name, {})
        for domain in domains:
            mine = [index for index, window in enumerate(places) if self.texts.domain[window] == domain]
            of_model[self.texts.domains[domain]] = self.texts.sums(losses[mine], [places[index] for index in mine])


def _dense_models(mixture: MixtureModel, announce: Callable[[str], None]) -> tuple[list[Runnable], list[str]]:
    """Open the base and every expert that is still there, with notes; without the base none is opened."""
    if mixture.config is None:
        return [], [f"{mixture.folder} does not say what it was merged from: base and experts are left out"]
    named = [(mixture.config.base_model, BASE)]
    named += [(e.source_model, f"expert {n}") for e, n in zip(mixture.config.experts, mixture.experts, strict=True)]
    try:
        return [open_dense(reference, name, announce) for reference, name in named], []
    except MoemergeError as error:
        why = f"{error} Paths in its {CONFIG_COPY} count from its folder, else from the current one."
        return [], [f"base, experts and their average are left out: {why}"]


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


class RoutingTally:
    """Counts what routers choose, by domain."""

    def __init__(self, mixture: MixtureModel, texts: Texts) -> None:
        self._mixture, self._texts = mixture, texts
        self._layers = {layer: place for place, layer in enumerate(mixture.moe_layers)}
        shape = (len(texts.domains), len(self._layers), len(mixture.experts))
        self._chosen, self._first = torch.zeros(shape), torch.zeros(shape)
        self._tokens, self._entropy, self._weight = (
            torch.zeros(shape[:2]),
            torch.zeros(shape[:2]),
            torch.zeros(shape[:2]),
        )

    def add(self, choice: Choice) -> None:
        """Count one layer's choices for one window."""
        counted = torch.tensor(self._texts.windows[choice.window].counted)
        place = self._texts.domain[choice.window], self._layers[choice.layer]
        experts, logits = choice.experts[counted], choice.logits[counted]
        count = len(self._mixture.experts)
        self._chosen[place] += torch.bincount(experts.flatten(), minlength=count)
        self._first[place] += torch.bincount(experts[:, 0], minlength=count)
        self._tokens[place] += len(experts)
        self._weight[place] += choice.weights[counted, 0].sum()
        given = shares(logits, self._mixture.family.scoring)
        self._entropy[place] -= torch.special.xlogy(given, given).sum() / math.log(max(count, 2))

    def of(self, domain: int) -> Routing:
        """The routing that was counted for a domain."""
        tokens = self._tokens[domain][:, None]
        load, first = self._chosen[domain] / tokens, self._first[domain] / tokens
        expert = self._texts.expert[domain]
        return Routing(
            accuracy=None if expert is None else float(first[:, expert].mean()),
            hit_rate=None if expert is None else float(load[:, expert].mean()),
            load=tuple(load.mean(dim=0).tolist()),
            load_by_layer=tuple(tuple(row) for row in load.tolist()),
            entropy=float((self._entropy[domain][:, None] / tokens).mean()),
            top_weight=float((self._weight[domain][:, None] / tokens).mean()),
        )


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
        recovered=by_domain,
        recovered_mean=recovered(sums, judged) if judged else None,
        routing={name: routing.of(place) for place, name in enumerate(texts.domains)},
        notes=(*notes, *no_better(losses, domains)),
    )
