"""What an analysis says in sentences, each with the number that it rests on."""

from collections.abc import Callable
from typing import Final

import numpy as np

from moemerge.analysis.advice_on_load import (
    advise_on_busy_experts,
    advise_on_generating,
    advise_on_idle_experts,
    advise_on_spare_experts,
)
from moemerge.analysis.advice_on_text import (
    advise_on_choices,
    advise_on_dense_layers,
    advise_on_lengths,
    advise_on_long_outputs,
    advise_on_token_ids,
)
from moemerge.analysis.advice_on_weights import (
    BESIDE,
    advise_on_depth,
    advise_on_equal_experts,
    advise_on_ffns_beside,
    advise_on_router_rows,
    mean_similarity,
)
from moemerge.analysis.figures import Analysis, TextFigures
from moemerge.analysis.means import mean, pair_means
from moemerge.analysis.wording import Advice, cosine

_OF_WEIGHTS: Final[tuple[Callable[[Analysis], Advice | None], ...]] = (
    advise_on_equal_experts, advise_on_router_rows, advise_on_depth,
)  # fmt: skip
_OF_TEXT: Final[tuple[Callable[[Analysis, TextFigures], Advice | None], ...]] = (
    advise_on_spare_experts, advise_on_dense_layers, advise_on_choices, advise_on_lengths, advise_on_token_ids,
    advise_on_idle_experts, advise_on_busy_experts, advise_on_long_outputs, advise_on_generating,
)  # fmt: skip
_ORDER: Final = (
    BESIDE, "equal experts", "experts to spare", "idle experts", "super experts", "long outputs", "dense layers",
    "experts per token", "generating", "tokens or context", "output lengths", "depth", "router rows",
)  # fmt: skip


def advise(analysis: Analysis) -> tuple[Advice, ...]:
    """Say what an analysis found: what is notable first, in an order of what is most use."""
    found = [*advise_on_ffns_beside(analysis), *(advice for topic in _OF_WEIGHTS if (advice := topic(analysis)))]
    if analysis.text:
        found += [advice for topic in _OF_TEXT if (advice := topic(analysis, analysis.text))]
    order = {name: place for place, name in enumerate(_ORDER)}
    return tuple(sorted(found, key=lambda one: (not one.is_notable, order[one.topic])))


def describe(analysis: Analysis) -> str:
    """Say in a sentence what was analysed, and how alike the experts are."""
    weights, text = analysis.weights, analysis.text
    means = {"their weights": mean_similarity(analysis)}
    if text:
        tokens = f"their outputs for {sum(text.tokens)} tokens"
        means[tokens] = mean(pair_means(text.output_similarity, len(text.names)))
    known = [(what, cosine(value)) for what, value in means.items() if not np.isnan(value)]
    told = [
        f"{what} {'one of' if place else 'have a mean cosine of'} {value}" for place, (what, value) in enumerate(known)
    ]
    alike = f"; {', '.join(told)}" if told else ""
    return (
        f"{analysis.model} is a {analysis.model_type} of {weights.experts} experts, {analysis.experts_per_token} per "
        f"token, in {len(weights.layers)} layer{'' if len(weights.layers) == 1 else 's'}{alike}."
    )
