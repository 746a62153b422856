"""Means over pairs of experts, and what an analysis finds of each layer in a number."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moemerge.analysis.figures import Analysis, ByRole, Numbers, TextFigures, WeightFigures


@dataclass(frozen=True)
class Series:
    """A figure of each layer."""

    group: str
    """What it is about; series of one group have the same unit."""
    name: str
    values: Mapping[int, float]
    """Values by the number of the layer; layers without one are left out."""

    def shared(self, other: "Series") -> dict[int, tuple[float, float]]:
        """Its values beside another's, by the number of the layer, of layers that both have."""
        return {layer: (value, other.values[layer]) for layer, value in self.values.items() if layer in other.values}


def mean(numbers: Numbers) -> float:
    """The mean of all numbers that are not NaN; NaN where there are none."""
    known = numbers[~np.isnan(numbers)]
    return float(known.mean()) if known.size else float("nan")


def mean_of_others(matrices: Numbers, experts: int) -> Numbers:
    """Mean of each expert's pairs with the other experts (layer, expert), without those that are NaN.

    Args:
        matrices: figures of pairs (layer, FFN, FFN), with the experts first.
        experts: how many of the FFNs are experts.
    """
    pairs = np.array(matrices[:, :experts, :experts], np.float64)
    pairs[:, np.arange(experts), np.arange(experts)] = np.nan
    known = ~np.isnan(pairs)
    count = known.sum(axis=2)
    sums = np.where(known, pairs, 0.0).sum(axis=2)
    means: Numbers = np.where(count > 0, sums / np.maximum(count, 1), np.nan)
    return means


def pair_means(matrices: Numbers, experts: int) -> Numbers:
    """Mean over all pairs of different experts, in both orders (layer,), without NaN; NaN where there are none."""
    different = ~np.eye(experts, dtype=bool)
    return np.array([mean(matrix[:experts, :experts][different]) for matrix in matrices], np.float64)


def over_roles(figures: ByRole) -> Numbers:
    """Mean over the projections of figures of one shape; NaN where one of them is."""
    stacked: Numbers = np.mean(np.stack(list(figures.values())), axis=0)
    return stacked


def generated_distance(text: TextFigures) -> Numbers:
    """Total variation distance (layer,) between the load while generating and while reading, as shares of all choices.

    That is the share of choices that would have to go to other experts: 0 for equal load, 1 for wholly other experts.
    Domains count alike in both. NaN where nothing was generated.
    """
    if text.generated is None:
        return np.full(len(text.layers), np.nan)
    read, made = (load / load.sum(axis=1, keepdims=True) for load in (text.load.mean(axis=0), text.generated))
    distances: Numbers = np.abs(read - made).sum(axis=1) / 2
    return distances


def series_of(analysis: Analysis) -> list[Series]:
    """All figures that are one number for each layer, or a mean over pairs of experts there."""
    return _of_weights(analysis.weights) + (_of_text(analysis.text) if analysis.text else [])


def _of_weights(weights: WeightFigures) -> list[Series]:
    experts = weights.experts
    matrices = {
        "whole matrices": over_roles(weights.similarity),
        "means over neurons": over_roles(weights.mean_similarity),
        "matched neurons": over_roles(weights.matched_similarity),
    }
    rows = {
        "similarity": pair_means(weights.router_similarity, experts),
        **{f"correlation with that of {role}": values for role, values in weights.correlation.items()},
    }
    found = [
        _series("Similarity of weights", name, weights.layers, pair_means(values, experts))
        for name, values in matrices.items()
    ]
    return found + [_series("Router rows", name, weights.layers, values) for name, values in rows.items()]


def _of_text(text: TextFigures) -> list[Series]:
    experts = len(text.names)
    outputs = {
        "all tokens": text.output_similarity,
        "tokens that choose both": text.output_similarity_chosen,
        "tokens that choose neither": text.output_similarity_others,
    }
    found = [
        _series("Similarity of outputs", name, text.layers, pair_means(values, experts))
        for name, values in outputs.items()
    ]
    shares = {
        "first expert foretold by the token's id": text.by_token,
        "first expert is the layer's most frequent": text.by_majority,
        "first expert has the longest output": text.largest_first,
        "choices that go elsewhere while generating": generated_distance(text),
        "intermediate states near 0": np.array([mean(layer) for layer in text.sparsity]),
    }
    found += [_series("Shares", name, text.layers, values) for name, values in shares.items()]
    measures = {
        "entropy of the load": text.entropy,
        "score and output length, correlation": text.norm_correlation,
        "first choice told by the layer before": _after_first(text.agreement),
        "first choice the same as in the layer before": _after_first(text.same_first),
    }
    return found + [_series("The choice", name, text.layers, values) for name, values in measures.items()]


def _after_first(values: Numbers) -> Numbers:
    """Figures of neighbouring layers (layer - 1,), as those of the later one (layer,)."""
    return np.concatenate([[np.nan], values])


def _series(group: str, name: str, layers: tuple[int, ...], values: Numbers) -> Series:
    known = {layer: float(value) for layer, value in zip(layers, values, strict=True) if not np.isnan(value)}
    return Series(group, name, known)
