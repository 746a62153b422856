"""Analyses for tests of what shows them: random figures of the right shapes, in which tests put what they ask for."""

from dataclasses import replace
from typing import Any

import numpy as np

from moemerge.analysis.figures import Analysis, Numbers, TextFigures, WeightFigures
from moemerge.families.choosing import Choosing
from moemerge.families.mixtral import MIXTRAL

ROLES = ("gate", "up", "down")


def pairs(random: np.random.Generator, layers: int, count: int, low: float = 0.2, high: float = 0.8) -> Numbers:
    """Symmetric matrices (layer, count, count) with 1 on the diagonal."""
    half = np.triu(random.uniform(low, high, (layers, count, count)), 1)
    return half + half.transpose(0, 2, 1) + np.eye(count)


def weight_figures(
    layers: int = 4, experts: int = 4, beside: int = 1, neurons: int = 6, seed: int = 0
) -> WeightFigures:
    random = np.random.default_rng(seed)
    count = experts + beside
    names = tuple(f"expert-{number}" for number in range(experts)) + tuple(f"beside-{n}" for n in range(beside))

    def by_role(make: Any) -> dict[str, Numbers]:
        return {role: make() for role in ROLES}

    return WeightFigures(
        layers=tuple(range(1, layers + 1)),
        names=names,
        experts=experts,
        similarity=by_role(lambda: pairs(random, layers, count)),
        mean_similarity=by_role(lambda: pairs(random, layers, count)),
        matched_similarity=by_role(lambda: pairs(random, layers, count)),
        matched_order=by_role(lambda: pairs(random, layers, count, -0.1, 0.3)),
        matched_neurons=neurons,
        router_similarity=pairs(random, layers, experts, -0.5, 0.5),
        correlation=by_role(lambda: random.uniform(-0.2, 0.2, layers)),
        norms=by_role(lambda: random.uniform(3, 4, (layers, count))),
        router_norms=random.uniform(0.5, 1, (layers, experts)),
        plane=by_role(lambda: random.normal(size=(layers, count, 2))),
        neuron_plane=random.normal(size=(layers, count, neurons, 2)),
        equal=(),
        nearly_equal=(),
        equal_beside=(),
        nearly_equal_beside=(),
    )


def text_figures(layers: int = 4, experts: int = 4, chosen: int = 2, seed: int = 1) -> TextFigures:
    random = np.random.default_rng(seed)
    tokens = (600, 400)
    load = np.stack([random.dirichlet(np.full(experts, 20.0), layers) for _ in tokens]) * chosen
    mass = random.dirichlet(np.full(experts, 50.0), layers)
    first, last = 1 / chosen + 0.1, 1 / chosen - 0.1
    weights = np.array([1.0]) if chosen == 1 else np.array([first, *[1 / chosen] * (chosen - 2), last])
    return TextFigures(
        layers=tuple(range(1, layers + 1)),
        names=tuple(f"expert-{number}" for number in range(experts)),
        domains=("code", "math"),
        tokens=tokens,
        output_similarity=pairs(random, layers, experts),
        output_similarity_chosen=pairs(random, layers, experts),
        output_similarity_others=pairs(random, layers, experts),
        output_norm=random.uniform(2, 3, (layers, experts)),
        ranks=random.integers(100, 200, (layers, experts, experts)),
        largest_first=np.full(layers, 1 / experts),
        chance=np.full(layers, 1 / experts),
        norm_correlation=random.uniform(-0.1, 0.1, layers),
        sparsity=random.uniform(0, 0.1, (layers, experts)),
        load=load,
        weight=np.full((layers, experts), 1 / chosen),
        saliency=mass * 3,
        mass_share=mass,
        together=pairs(random, layers, experts, 0.1, 0.2),
        entropy=random.uniform(0.9, 1, layers),
        by_token=np.full(layers, 0.6),
        by_majority=np.full(layers, 0.4),
        agreement=random.uniform(0.2, 0.4, layers - 1),
        same_first=random.uniform(0.2, 0.4, layers - 1),
        generated=None,
        generated_tokens=0,
        choice_weight=np.tile(weights, (layers, 1)),
    )


def analysis_of(layers: int = 4, experts: int = 4, *, text: bool = True, seed: int = 0, **keys: Any) -> Analysis:
    """An analysis of a made-up mixture, two experts per token."""
    weights = weight_figures(layers, experts, seed=seed, **keys)
    figures = text_figures(layers, experts, seed=seed + 1) if text else None
    return Analysis("tiny", "mixtral", 2, Choosing("softmax"), MIXTRAL, weights, figures)


def with_weights(analysis: Analysis, **figures: Any) -> Analysis:
    """The same analysis with other figures of weights."""
    return replace(analysis, weights=replace(analysis.weights, **figures))


def with_text(analysis: Analysis, **figures: Any) -> Analysis:
    """The same analysis with other figures of text."""
    assert analysis.text
    return replace(analysis, text=replace(analysis.text, **figures))
