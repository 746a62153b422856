"""Losses of dense models, which recipes are judged beside: of each text's own expert, else of the base model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import BASE, EXPERT, Sums
from moemerge.evaluation.kept_losses import KeptLosses
from moemerge.evaluation.runnable import Runnable, open_dense
from moemerge.evaluation.running import run_model
from moemerge.passes.compute_dtype import Compute
from moemerge.planning.plan import MergePlan
from moemerge.progress import Progress, Task


@dataclass(frozen=True)
class DenseModels:
    """The dense model that each domain is measured beside."""

    names: tuple[str, ...]
    """Name of each domain's model."""
    models: Mapping[str, Runnable]

    @classmethod
    def open(cls, plan: MergePlan, texts: Texts, announce: Callable[[str], None]) -> "DenseModels":
        """Open the experts that domains are named after, and the base if a domain has another name.

        Args:
            plan: the plan of a merge of all experts.
            texts: the domains, and the expert of each.
            announce: called with a line about each step that takes long.

        Raises:
            IncompatibleError: one of them cannot be run.
            CheckpointError: its files are damaged.
        """
        config = plan.config
        found = [(BASE, config.base_model)] + [
            (f"{EXPERT}{name}", expert.source_model)
            for name, expert in zip(config.expert_names, config.experts, strict=True)
        ]
        used = [0 if expert is None else expert + 1 for expert in texts.expert]
        models = {found[place][0]: open_dense(found[place][1], found[place][0], announce) for place in sorted({*used})}
        return cls(tuple(found[place][0] for place in used), models)


@dataclass
class References:
    """Runs each domain's dense model over its text, unless its losses there are kept."""

    dense: DenseModels
    compute: Compute
    kept: KeptLosses
    progress: Progress

    def losses(self, texts: Texts) -> dict[int, float]:
        """Compute the loss of each window's dense model, in nats over its tokens, by the window's number."""
        found: dict[int, float] = {}
        for domain, name in enumerate(self.dense.names):
            model, numbers = self.dense.models[name], texts.of(domain)
            windows = [texts.windows[number] for number in numbers]
            known = self.kept.find(model, windows)
            if known is None:
                title = f"{name} on {texts.domains[domain]}"
                known = run_model(model, windows, self.compute, progress=partial(self.progress, Task("losses", title)))
                self.kept.keep(model, windows, known)
            found |= dict(zip(numbers, known.tolist(), strict=True))
        return found


def sums_by_domain(texts: Texts, losses: Mapping[int, float]) -> dict[str, Sums]:
    """Sum losses of all windows, by their numbers, for each domain and document."""
    return {
        name: texts.sums(torch.tensor([losses[w] for w in texts.of(domain)], dtype=torch.float64), texts.of(domain))
        for domain, name in enumerate(texts.domains)
    }
