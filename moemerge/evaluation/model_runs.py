"""Models that run one after the other over the same text, and what routers choose there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from moemerge.evaluation.choices import Choice
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import Routing, Sums
from moemerge.evaluation.kept_losses import KeptLosses
from moemerge.evaluation.runnable import MixtureModel, Runnable
from moemerge.evaluation.running import run_model
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.progress import Progress, Task
from moemerge.routers.scoring import shares


@dataclass
class Runs:
    """Runs models over the texts and keeps their losses by model and domain."""

    texts: Texts
    compute: Compute
    progress: Progress
    """Called with the model that runs, and the layers of all `planned` ones."""
    kept: KeptLosses | None = None
    """Losses of earlier runs; None where every model is run."""
    planned: int = 1
    """How many models are to be run."""
    sums: dict[str, dict[str, Sums]] = field(default_factory=dict)
    _number: int = 0

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
        self._number += 1
        found: dict[str, Sums] = {}
        missing = []
        for domain in domains:
            known = self.kept.find(model, self._windows(domain)) if self.kept else None
            if known is None:
                missing.append(domain)
            else:
                found[self.texts.domains[domain]] = self.texts.sums(known, self.texts.of(domain))
        if missing:
            found |= self._run(name, model, missing, mixture, chosen)
        self.sums.setdefault(name, {}).update({d: found[d] for d in self.texts.domains if d in found})

    def _run(
        self,
        name: str,
        model: Runnable,
        domains: Sequence[int],
        mixture: MixtureModel | None,
        chosen: Callable[[Choice], None],
    ) -> dict[str, Sums]:
        """Run a model over some domains; returns its losses by document, for each of them."""
        places = [window for domain in domains for window in self.texts.of(domain)]
        losses = run_model(
            model,
            [self.texts.windows[window] for window in places],
            self.compute,
            mixture=mixture,
            chosen=chosen,
            progress=lambda done, total: self._report(name, done, total),
        )
        found = {}
        for domain in domains:
            mine = [index for index, window in enumerate(places) if self.texts.domain[window] == domain]
            found[self.texts.domains[domain]] = self.texts.sums(losses[mine], [places[index] for index in mine])
            if self.kept:
                self.kept.keep(model, self._windows(domain), losses[mine])
        return found

    def _windows(self, domain: int) -> list[Window]:
        return [self.texts.windows[window] for window in self.texts.of(domain)]

    def _report(self, name: str, done: int, layers: int) -> None:
        before = (self._number - 1) * layers
        self.progress(
            Task("losses", f"{name} ({self._number} of {self.planned})"), before + done, self.planned * layers
        )


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
        given = shares(logits, self._mixture.choosing.scoring)
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
