"""What an analysis says in sentences of the weights, each with the number that it rests on."""

from math import sqrt
from typing import Final

import numpy as np

from moemerge.analysis.beside import SHARED
from moemerge.analysis.figures import Analysis, Numbers, WeightFigures
from moemerge.analysis.means import mean, over_roles, pair_means
from moemerge.analysis.sparing import keep_without_copies
from moemerge.analysis.wording import Advice, cosine, listed

BESIDE: Final = "beside"
"""The topic of what is said of FFNs that stand beside the experts."""
_GOES_WITH: Final = 0.3
_BEYOND_CHANCE: Final = 2.0  # standard deviations of the correlation of unrelated numbers
_THIRDS: Final = 3
_APART: Final = 1.5


def mean_similarity(analysis: Analysis) -> float:
    """Mean cosine of all pairs of experts' weights over all layers; NaN where none is known."""
    return mean(pair_means(over_roles(analysis.weights.similarity), analysis.weights.experts))


def advise_on_equal_experts(analysis: Analysis) -> Advice | None:
    """Say which experts are copies, or nearly."""
    weights = analysis.weights
    if weights.equal:
        groups = listed([listed([weights.names[expert] for expert in group], " = ") for group in weights.equal], "; ")
        keep = keep_without_copies(analysis)
        how = (
            f"`moemerge prune --keep {keep}` leaves out {weights.experts - (keep or 0)}: no FFN is lost; their router "
        )
        sentence = f"Equal in all layers, number for number: {groups}." + (f" {how}rows become one." if keep else "")
        return Advice("equal experts", sentence, is_notable=True)
    similarity = over_roles(weights.similarity)
    if weights.nearly_equal:
        pairs = [
            f"{weights.names[one]} and {weights.names[other]} ({cosine(mean(similarity[:, one, other]))})"
            for one, other in weights.nearly_equal
        ]
        rest = f"the mean of all pairs is {cosine(mean_similarity(analysis))}"
        return Advice("equal experts", f"Nearly equal, by cosine: {listed(pairs)}; {rest}.", is_notable=True)
    means = np.array([[mean(similarity[:, a, b]) for b in range(weights.experts)] for a in range(weights.experts)])
    means[np.tril_indices(weights.experts)] = np.nan
    if np.isnan(means).all():
        return None
    one, other = np.unravel_index(int(np.nanargmax(means)), means.shape)
    value = f"{cosine(float(means[one, other]))}, of all pairs {cosine(mean_similarity(analysis))}"
    pair = f"{weights.names[one]} and {weights.names[other]}"
    return Advice("equal experts", f"No experts are copies: the most alike are {pair}, with {value}.", is_notable=False)


def advise_on_ffns_beside(analysis: Analysis) -> list[Advice]:
    """Say of the shared expert, and of each dense model beside, which expert it is most like, or a copy of."""
    numbers = range(analysis.weights.experts, len(analysis.weights.names))
    return [advice for number in numbers if (advice := _advise_on_ffn(analysis.weights, number))]


def _advise_on_ffn(weights: WeightFigures, number: int) -> Advice | None:
    name = weights.names[number]
    name = "The shared expert" if name == SHARED else name
    if copied := [weights.names[expert] for expert, beside in weights.equal_beside if beside == number]:
        there = [layer for layer, norm in zip(weights.layers, weights.norms["up"][:, number], strict=True) if norm >= 0]
        equal = f"their matrices are equal in {len(there)} of {len(weights.layers)} layers, number for number"
        return Advice(BESIDE, f"{name} is a copy of {listed(copied, ' = ')}: {equal}.", is_notable=True)
    cosines = _with_experts(over_roles(weights.similarity), weights, number)
    if other_width := bool(np.isnan(cosines).all()):
        cosines = _with_experts(over_roles(weights.mean_similarity), weights, number)
    if np.isnan(cosines).all():
        return None
    overall = cosine(mean(cosines))
    if near := [expert for expert, beside in weights.nearly_equal_beside if beside == number]:
        told = listed([f"{weights.names[expert]} ({cosine(cosines[expert])})" for expert in near])
        sentence = f"{name} is nearly equal to {told}, by cosine; its mean with all experts is {overall}."
        return Advice(BESIDE, sentence, is_notable=True)
    nearest = int(np.nanargmax(cosines))
    most = f"{weights.names[nearest]}: a mean cosine of {cosine(cosines[nearest])}, with all experts {overall}"
    how = "has another width than the experts; by the means over neurons, it" if other_width else ""
    return Advice(BESIDE, f"{name} {how}{' ' if how else ''}is most like {most}.", is_notable=False)


def _with_experts(matrices: Numbers, weights: WeightFigures, number: int) -> Numbers:
    """Means over layers of an FFN's figures with each expert (expert,), from those of pairs (layer, FFN, FFN)."""
    return np.array([mean(matrices[:, expert, number]) for expert in range(weights.experts)])


def advise_on_router_rows(analysis: Analysis) -> Advice | None:
    """Say whether router rows are alike where experts are, by more than chance gives."""
    correlations, experts = analysis.weights.correlation, analysis.weights.experts
    known = {role: mean(values) for role, values in correlations.items() if not np.isnan(values).all()}
    if not known:
        return None
    role = max(known, key=lambda one: abs(known[one]))
    pairs = int((~np.isnan(correlations[role])).sum()) * experts * (experts - 1) // 2
    goes = abs(known[role]) >= max(_GOES_WITH, _BEYOND_CHANCE / sqrt(pairs))
    told = ", ".join(f"{value:.2f} with {role}" for role, value in known.items())
    verb = ("goes with" if known[role] > 0 else "runs against") if goes else "does not go with"
    return Advice(
        "router rows",
        f"Similarity of router rows {verb} that of experts' matrices: the correlation is {told}.",
        is_notable=goes,
    )


def advise_on_depth(analysis: Analysis) -> Advice | None:
    """Say at which depth experts differ most."""
    text, weights = analysis.text, analysis.weights
    if text:
        what, values = "outputs", pair_means(text.output_similarity, len(text.names))
    else:
        what, values = "weights", pair_means(over_roles(weights.similarity), weights.experts)
    if len(values) < _THIRDS:
        return None
    thirds = [mean(part) for part in np.array_split(values, _THIRDS)]
    if any(map(np.isnan, thirds)):
        return None
    apart = [max(1 - value, 1e-12) for value in thirds]
    is_notable = max(apart) >= _APART * min(apart)
    where = ("first", "middle", "last")[apart.index(max(apart))]
    begin = f"Experts differ most in the {where} third" if is_notable else "Experts differ alike at all depths"
    told = f"{cosine(thirds[0])}, {cosine(thirds[1])} and {cosine(thirds[2])}"
    thirds_of = "in the first, middle and last third of the layers"
    return Advice("depth", f"{begin}: mean cosine of {what} is {told} {thirds_of}.", is_notable)
