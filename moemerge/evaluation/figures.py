"""What an evaluation found, and how sure it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_RESAMPLINGS: Final = 1000
_INTERVAL: Final = (2.5, 97.5)
FEWEST_DOCUMENTS: Final = 5
"""That have an interval."""
# Below this, in nats per token, choosing experts cannot be told from mixing them all.
_NO_GAIN: Final = 0.005
MERGED: Final = "merged"
UNIFORM: Final = "uniform mixture"
ORACLE: Final = "label oracle"
SOUP: Final = "weight average"
BASE: Final = "base"

Sums = NDArray[np.float64]
"""(document, 2): loss in nats summed over tokens, and tokens."""


@dataclass(frozen=True)
class Domain:
    """One `--data NAME=PATH`."""

    name: str
    expert: int | None
    """The expert of this name."""
    documents: int
    """That were read."""
    available: int
    """Documents that there are."""
    tokens: int
    """That a loss was computed for."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval over documents; None where there are too few for one."""

    value: float
    low: float | None
    high: float | None

    @property
    def reversed(self) -> "Estimate":
        """The same of the number with the other sign."""
        return Estimate(
            -self.value, None if self.high is None else -self.high, None if self.low is None else -self.low
        )  # fmt: skip

    @property
    def precise(self) -> str:
        """Value and interval for people, of small differences."""
        found = "" if self.low is None or self.high is None else f" ({self.low:.4f} to {self.high:.4f})"
        return f"{self.value:.4f}{found}"

    @property
    def interval(self) -> str:
        """The interval for people, or nothing."""
        return "" if self.low is None or self.high is None else f" ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Routing:
    """What the merged model's routers do with one domain's tokens, averaged over layers."""

    accuracy: float | None
    """Share of tokens whose first choice is the domain's expert."""
    hit_rate: float | None
    """Share of tokens that have it among their choices."""
    load: tuple[float, ...]
    """By expert: share of tokens that have it among their choices."""
    load_by_layer: tuple[tuple[float, ...], ...]
    """By layer with a router and by expert: the same."""
    entropy: float
    """Of the weights before the choice, as a share of what equal ones have."""
    top_weight: float
    """Mean weight of the first choice."""


@dataclass(frozen=True)
class Evaluation:
    """A merged model beside the models that it is made of."""

    model: str
    experts: tuple[str, ...]
    experts_per_token: int
    layers: tuple[int, ...]
    """Those with a router."""
    domains: tuple[Domain, ...]
    losses: Mapping[str, Mapping[str, Estimate]]
    """By model and domain: nats per token. A model may lack a domain, such as the oracle where there is no expert."""
    mean_losses: Mapping[str, float]
    """By model that has all domains: the mean over domains, each weighing alike."""
    recovered: Mapping[str, Estimate]
    """By domain: `(uniform - merged) / (uniform - oracle)`, where choosing gains anything."""
    recovered_mean: Estimate | None
    """The same of the means over the domains that have an expert."""
    routing: Mapping[str, Routing]
    """By domain."""
    notes: tuple[str, ...]
    """What was left out and why, and where the merged model is no better than what costs less."""


def estimate(sums: Sums) -> Estimate:
    """Loss per token and its interval."""
    return _estimate(*_per_token(sums, 0), len(sums))


def recovered(losses: Mapping[str, Mapping[str, Sums]], domains: Sequence[str]) -> Estimate | None:
    """`(uniform - merged) / (uniform - oracle)` of losses averaged over domains; None where the oracle gains nothing.

    Documents are drawn anew within each domain, the same ones for every model.
    """
    (merged, drawn), (uniform, uniforms), (oracle, oracles) = (
        _mean(losses[model], domains) for model in (MERGED, UNIFORM, ORACLE)
    )
    if uniform - oracle < _NO_GAIN:
        return None
    gains = np.maximum(uniforms - oracles, 1e-12)
    fewest = min(len(losses[MERGED][domain]) for domain in domains)
    return _estimate((uniform - merged) / (uniform - oracle), (uniforms - drawn) / gains, fewest)


def difference(one: Mapping[str, Sums], other: Mapping[str, Sums]) -> Estimate:
    """How much higher the loss of one model is than another's, averaged over domains, on the same documents."""
    (value, drawn), (less, others) = _mean(one, list(one)), _mean(other, list(one))
    return _estimate(value - less, drawn - others, min(map(len, one.values())))


def no_better(losses: Mapping[str, Mapping[str, Estimate]], domains: Sequence[Domain]) -> list[str]:
    """Where the merged model loses to a baseline, in words."""
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
    """Loss averaged over domains, and the same of documents drawn anew within each, alike for every model."""
    values, samples = zip(*(_per_token(sums[domain], seed) for seed, domain in enumerate(domains)), strict=True)
    return math.fsum(values) / len(values), np.mean(samples, axis=0)


def _per_token(sums: Sums, seed: int) -> tuple[float, NDArray[np.float64]]:
    """Loss per token, and the same (resampling,) of documents drawn with replacement."""
    drawn = np.random.default_rng(seed).integers(len(sums), size=(_RESAMPLINGS, len(sums)))
    total, again = sums.sum(axis=0), sums[drawn].sum(axis=1)
    return float(total[0] / total[1]), again[:, 0] / again[:, 1]
