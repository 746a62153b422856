"""The results of an evaluation, with their confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_RESAMPLINGS: Final = 1000
# A mean of losses in nats; equal models in another order of additions differ by less.
_ROUNDING: Final = 1e-4
_INTERVAL: Final = (2.5, 97.5)
FEWEST_DOCUMENTS: Final = 5
"""Fewest documents that get an interval."""
NO_GAIN: Final = 0.005
"""Gain of the oracle in nats per token below which there is nothing to recover."""
MERGED: Final = "merged"
UNIFORM: Final = "uniform mixture"
ORACLE: Final = "label oracle"
SOUP: Final = "weight average"
BASE: Final = "base"
UNEDITED: Final = "before the edit"
EXPERT: Final = "expert "
"""How the name of a dense expert begins; the expert's own name follows."""

Sums = NDArray[np.float64]
"""Sums by document (document, 2): loss in nats over its tokens, and their number."""


@dataclass(frozen=True)
class Domain:
    """The text of one `--data NAME=PATH`, and how much of it was read."""

    name: str
    expert: int | None
    """Number of the expert of this name; None without one."""
    documents: int
    """Number of documents that were read."""
    available: int
    """Number of documents that there are."""
    tokens: int
    """Number of tokens that a loss was computed for."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval over documents; None where there are too few for one."""

    value: float
    low: float | None
    high: float | None

    @property
    def reversed(self) -> "Estimate":
        """The estimate of the number with the opposite sign."""
        return Estimate(-self.value, None if self.high is None else -self.high, None if self.low is None else -self.low)

    @property
    def precise(self) -> str:
        """Value and interval in words, with digits enough for small differences."""
        found = "" if self.low is None or self.high is None else f" ({self.low:.4f} to {self.high:.4f})"
        return f"{self.value:.4f}{found}"

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, and the number is more than rounding makes; else 0."""
        if self.low is None or self.high is None or abs(self.value) < _ROUNDING:
            return 0
        return (self.low > 0) - (self.high < 0)

    @property
    def interval(self) -> str:
        """The interval in words; empty where there is none."""
        return "" if self.low is None or self.high is None else f" ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Routing:
    """The choices of the merged model's routers for one domain's tokens, averaged over layers."""

    accuracy: float | None
    """Share of tokens whose first choice is the domain's expert."""
    hit_rate: float | None
    """Share of tokens that have the domain's expert among their choices."""
    load: tuple[float, ...]
    """Share of tokens that have each expert among their choices."""
    load_by_layer: tuple[tuple[float, ...], ...]
    """Share of tokens that have each expert among their choices, for each layer with a router."""
    entropy: float
    """Entropy of the weights before the choice, as a share of that of equal weights."""
    top_weight: float
    """Mean weight of the first choice."""


@dataclass(frozen=True)
class Evaluation:
    """A merged model beside the models that it is made of."""

    model: str
    experts: tuple[str, ...]
    experts_per_token: int
    layers: tuple[int, ...]
    """Numbers of the layers with a router."""
    dtype: str
    """What every model was run in: `float32` or `bfloat16`."""
    domains: tuple[Domain, ...]
    losses: Mapping[str, Mapping[str, Estimate]]
    """Nats per token by model and domain. A model may lack a domain, such as the oracle one without an expert."""
    mean_losses: Mapping[str, float]
    """Mean loss over domains, each weighing alike, for every model that has all domains."""
    differences: Mapping[str, Estimate]
    """How much higher the merged model's mean loss is than that of each other model, on the same documents."""
    recovered: Mapping[str, Estimate]
    """`(uniform - merged) / (uniform - oracle)` by domain, where choosing gains anything."""
    recovered_mean: Estimate | None
    """`(uniform - merged) / (uniform - oracle)` of the mean losses over the domains that have an expert."""
    routing: Mapping[str, Routing]
    """Routing by domain."""
    notes: tuple[str, ...]
    """Notes on what was left out and why, and where the merged model is no better than what costs less."""


def by_document(losses: Sequence[float], counts: Sequence[int], documents: Sequence[int]) -> Sums:
    """Sum the losses and numbers of tokens of windows by their documents, without those that hold no token."""
    totals: dict[int, list[float]] = {}
    for loss, count, document in zip(losses, counts, documents, strict=True):
        total = totals.setdefault(document, [0.0, 0.0])
        total[0] += loss
        total[1] += count
    return np.array([total for total in totals.values() if total[1]])


def estimate(sums: Sums) -> Estimate:
    """Estimate the loss per token."""
    return _estimate(*_per_token(sums, 0), len(sums))


def recovered(losses: Mapping[str, Mapping[str, Sums]], domains: Sequence[str]) -> Estimate | None:
    """Estimate `(uniform - merged) / (uniform - oracle)` of losses averaged over domains; None without an oracle gain.

    Documents are resampled within each domain, the same ones for every model.
    """
    (merged, drawn), (uniform, uniforms), (oracle, oracles) = (
        _mean(losses[model], domains) for model in (MERGED, UNIFORM, ORACLE)
    )
    if uniform - oracle < NO_GAIN:
        return None
    gains = np.maximum(uniforms - oracles, 1e-12)
    fewest = min(len(losses[MERGED][domain]) for domain in domains)
    return _estimate((uniform - merged) / (uniform - oracle), (uniforms - drawn) / gains, fewest)


def difference(one: Mapping[str, Sums], other: Mapping[str, Sums]) -> Estimate:
    """Estimate how much higher one model's loss is than another's, averaged over domains, on the same documents."""
    (value, drawn), (less, others) = _mean(one, list(one)), _mean(other, list(one))
    return _estimate(value - less, drawn - others, min(map(len, one.values())))


def no_better(losses: Mapping[str, Mapping[str, Estimate]], domains: Sequence[Domain]) -> list[str]:
    """Say in words where the merged model loses to a baseline."""
    found = []
    for baseline in (SOUP, UNIFORM, BASE):
        worse = [
            f"{domain.name} ({losses[MERGED][domain.name].value:.3f} against {losses[baseline][domain.name].value:.3f})"
            for domain in domains
            if baseline in losses
            and domain.name in losses[baseline]
            and losses[MERGED][domain.name].value >= losses[baseline][domain.name].value
        ]
        if worse:
            found.append(f"the merged model is no better than the {baseline} on {', '.join(worse)}")
    return found


def _estimate(value: float, samples: NDArray[np.float64], documents: int) -> Estimate:
    if documents < FEWEST_DOCUMENTS:
        return Estimate(value, None, None)
    low, high = np.percentile(samples, _INTERVAL)
    return Estimate(value, float(low), float(high))


def _mean(sums: Mapping[str, Sums], domains: Sequence[str]) -> tuple[float, NDArray[np.float64]]:
    """The loss averaged over domains, and resampled ones; documents are drawn within domains, alike for all models."""
    values, samples = zip(*(_per_token(sums[domain], seed) for seed, domain in enumerate(domains)), strict=True)
    return math.fsum(values) / len(values), np.mean(samples, axis=0)


def _per_token(sums: Sums, seed: int) -> tuple[float, NDArray[np.float64]]:
    """The loss per token, and losses (resampling,) of documents drawn with replacement."""
    drawn = np.random.default_rng(seed).integers(len(sums), size=(_RESAMPLINGS, len(sums)))
    total, again = sums.sum(axis=0), sums[drawn].sum(axis=1)
    return float(total[0] / total[1]), again[:, 0] / again[:, 1]
