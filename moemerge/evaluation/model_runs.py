"""Models that run one after the other over the same text, and what routers choose there."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moemerge.evaluation.choices import Choice
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import Routing, Sums
from moemerge.evaluation.kept_losses import KeptLosses
from moemerge.evaluation.processes import ChoiceTally, Processes, run_windows
from moemerge.evaluation.runnable import MixtureModel, Runnable
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
    """Called with the model that runs, and the layers of all `planned` ones, or parts of the text for each."""
    kept: KeptLosses | None = None
    """Losses of earlier runs; None where every model is run."""
    planned: int = 1
    """How many models are to be run."""
    processes: Processes | None = None
    """The processes that share the text; None for this one alone."""
    sums: dict[str, dict[str, Sums]] = field(default_factory=dict)
    _number: int = 0

    def run(
        self,
        name: str,
        model: Runnable,
        *,
        domains: Sequence[int] | None = None,
        mixture: MixtureModel | None = None,
        tally: ChoiceTally | None = None,
    ) -> None:
        """Run a model over all domains or some, and keep its losses by document under a name; see `run_windows`."""
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
            found |= self._run(name, model, missing, mixture, tally)
        self.sums.setdefault(name, {}).update({d: found[d] for d in self.texts.domains if d in found})

    def _run(
        self,
        name: str,
        model: Runnable,
        domains: Sequence[int],
        mixture: MixtureModel | None,
        tally: ChoiceTally | None,
    ) -> dict[str, Sums]:
        """Run a model over some domains; returns its losses by document, for each of them."""
        places = [window for domain in domains for window in self.texts.of(domain)]
        losses = run_windows(
            model,
            [self.texts.windows[window] for window in places],
            self.compute,
            self.processes,
            mixture,
            tally,
            lambda done, total: self._report(name, done, total),
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

    def _report(self, name: str, done: int, of_model: int) -> None:
        task = Task("losses", f"{name} ({self._number} of {self.planned})", in_parts=self.processes is not None)
        self.progress(task, (self._number - 1) * of_model + done, self.planned * of_model)


class RoutingTally:
    """Counts what routers choose, by domain."""

    def __init__(self, mixture: MixtureModel, texts: Texts) -> None:
        self._scoring, self._expert = mixture.choosing.scoring, texts.expert
        self._layers = {layer: place for place, layer in enumerate(mixture.moe_layers)}
        shape = (len(texts.domains), len(self._layers), len(mixture.experts))
        self.windows = [(window.counted, domain) for window, domain in zip(texts.windows, texts.domain, strict=True)]
        """Which tokens of each window count, and its domain."""
        self.sums = {name: torch.zeros(shape) for name in ("chosen", "first")}
        """Sums by domain and layer, and some by expert."""
        self.sums |= {name: torch.zeros(shape[:2]) for name in ("tokens", "entropy", "top_weight")}
        self.sums |= {"weight": torch.zeros(shape, dtype=torch.float64)}

    @property
    def weights(self) -> dict[int, list[float]]:
        """The mean weight of each expert over the tokens of all domains, by layer; those of a layer add up to 1."""
        sums = self.sums["weight"].sum(dim=0)
        return {layer: (sums[place] / sums[place].sum()).tolist() for layer, place in self._layers.items()}

    def part(self, windows: Sequence[int]) -> "RoutingTally":
        """Make an empty tally for some of the windows; see `ChoiceTally`."""
        made = copy.copy(self)
        made.windows = [self.windows[window] for window in windows]
        made.sums = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        return made

    def join(self, part: "RoutingTally", _windows: Sequence[int]) -> None:
        """Add what a part has counted."""
        for name, total in part.sums.items():
            self.sums[name] += total

    def add(self, choice: Choice) -> None:
        """Count one layer's choices for one window."""
        counted, domain = self.windows[choice.window]
        mask, place, sums = torch.tensor(counted), (domain, self._layers[choice.layer]), self.sums
        experts, logits, weights = choice.experts[mask], choice.logits[mask], choice.weights[mask]
        count = sums["chosen"].shape[2]
        sums["chosen"][place] += torch.bincount(experts.flatten(), minlength=count)
        sums["first"][place] += torch.bincount(experts[:, 0], minlength=count)
        sums["tokens"][place] += len(experts)
        sums["top_weight"][place] += weights[:, 0].sum()
        sums["weight"][place].index_add_(0, experts.flatten(), weights.flatten().double())
        given = shares(logits, self._scoring)
        sums["entropy"][place] -= torch.special.xlogy(given, given).sum() / math.log(max(count, 2))

    def of(self, domain: int) -> Routing:
        """The routing that was counted for a domain."""
        sums = {name: total[domain] for name, total in self.sums.items()}
        tokens = sums["tokens"][:, None]
        load, first = sums["chosen"] / tokens, sums["first"] / tokens
        expert = self._expert[domain]
        return Routing(
            accuracy=None if expert is None else float(first[:, expert].mean()),
            hit_rate=None if expert is None else float(load[:, expert].mean()),
            load=tuple(load.mean(dim=0).tolist()),
            load_by_layer=tuple(tuple(row) for row in load.tolist()),
            entropy=float((sums["entropy"][:, None] / tokens).mean()),
            top_weight=float((sums["top_weight"][:, None] / tokens).mean()),
        )
