"""What an analysis says in sentences, each with the number that it rests on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from moemerge.analysis.experts import dead_experts, super_experts
from moemerge.analysis.figures import Analysis, Numbers, TextFigures
from moemerge.analysis.means import mean, over_roles, pair_means
from moemerge.analysis.wording import NEAR, ROUNDED, cosine, listed, named_layers

# Each is where a sentence says something else; the numbers stand in the sentence, for readers who would draw the line
# elsewhere.
_SPARE: Final = 0.05  # of the weights times output lengths
_SMALL_CHOICE: Final = 0.5  # of what each choice would have if all had the same
_FOLLOWS: Final = 0.2  # of the way from chance to certainty, and as a correlation
_KNOWN: Final = 0.9
_LITTLE: Final = 0.2  # of what experts differ by in the middle of all layers
_LONG: Final = 5.0  # times the median of the layer
_GOES_WITH: Final = 0.3
_THIRDS: Final = 3
_APART: Final = 1.5


@dataclass(frozen=True)
class Advice:
    """A finding in words."""

    topic: str
    sentence: str
    is_notable: bool
    """Whether there is something to do or to know; otherwise the sentence says that there is nothing, and how much."""


def advise(analysis: Analysis) -> tuple[Advice, ...]:
    """Say what an analysis found: what is notable first, in an order of what is most use."""
    found = [advice for topic in _OF_WEIGHTS if (advice := topic(analysis))]
    if analysis.text:
        found += [advice for topic in _OF_TEXT if (advice := topic(analysis, analysis.text))]
    order = {name: place for place, name in enumerate(_ORDER)}
    return tuple(sorted(found, key=lambda one: (not one.is_notable, order[one.topic])))


def describe(analysis: Analysis) -> str:
    """Say in a sentence what was analysed, and how alike the experts are."""
    weights, text = analysis.weights, analysis.text
    alike = f"their weights have a mean cosine of {cosine(_mean_similarity(analysis))}"
    if text:
        outputs = mean(pair_means(text.output_similarity, len(text.names)))
        alike += f", their outputs for {sum(text.tokens)} tokens one of {cosine(outputs)}"
    return (
        f"{analysis.model} is a {analysis.model_type} of {weights.experts} experts, {analysis.experts_per_token} per "
        f"token, in {len(weights.layers)} layer{'' if len(weights.layers) == 1 else 's'}; {alike}."
    )


def _mean_similarity(analysis: Analysis) -> float:
    return mean(pair_means(over_roles(analysis.weights.similarity), analysis.weights.experts))


def _equal(analysis: Analysis) -> Advice | None:
    weights = analysis.weights
    if weights.equal:
        groups = "; ".join(" = ".join(weights.names[expert] for expert in group) for group in weights.equal)
        spare = sum(len(group) - 1 for group in weights.equal)
        return Advice(
            "equal experts",
            f"Equal in all layers, number for number: {groups}. `moemerge prune` leaves out {spare} without a loss.",
            is_notable=True,
        )
    similarity = over_roles(weights.similarity)
    if weights.nearly_equal:
        pairs = [
            f"{weights.names[one]} and {weights.names[other]} ({cosine(mean(similarity[:, one, other]))})"
            for one, other in weights.nearly_equal
        ]
        rest = f"the mean of all pairs is {cosine(_mean_similarity(analysis))}"
        return Advice("equal experts", f"Nearly equal, by cosine: {listed(pairs)}; {rest}.", is_notable=True)
    means = np.array([[mean(similarity[:, a, b]) for b in range(weights.experts)] for a in range(weights.experts)])
    means[np.tril_indices(weights.experts)] = np.nan
    if np.isnan(means).all():
        return None
    one, other = np.unravel_index(int(np.nanargmax(means)), means.shape)
    value = f"{cosine(float(means[one, other]))}, of all pairs {cosine(_mean_similarity(analysis))}"
    pair = f"{weights.names[one]} and {weights.names[other]}"
    return Advice("equal experts", f"No experts are copies: the most alike are {pair}, with {value}.", is_notable=False)


def _rows(analysis: Analysis) -> Advice | None:
    known = {role: mean(values) for role, values in analysis.weights.correlation.items()}
    known = {role: value for role, value in known.items() if not np.isnan(value)}
    if not known:
        return None
    goes = max(map(abs, known.values())) >= _GOES_WITH
    told = ", ".join(f"{value:.2f} with {role}" for role, value in known.items())
    verb = "goes" if goes else "does not go"
    return Advice(
        "router rows",
        f"Similarity of router rows {verb} with that of experts' matrices: the correlation is {told}.",
        is_notable=goes,
    )


def _depth(analysis: Analysis) -> Advice | None:
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


def _dispensable(analysis: Analysis, text: TextFigures) -> Advice:
    """Say which experts could go: those that `prune` would leave out first, as long as they have little together."""
    experts = len(text.names)
    sums = text.saliency.sum(axis=1, keepdims=True)
    shares = np.where(sums > 0, text.saliency / np.where(sums > 0, sums, 1), 1 / experts).mean(axis=0)
    order = np.argsort(shares, kind="stable")[: experts - max(2, analysis.experts_per_token)]
    lost = np.cumsum(text.mass_share.mean(axis=0)[order])
    spare = order[: int((lost <= _SPARE).sum())]
    if not len(spare):
        least = int(np.argmin(shares))
        share = f"{text.mass_share.mean(axis=0)[least]:.1%} of weights times output lengths"
        equal = f"where an equal share is {1 / experts:.1%}"
        sentence = f"No expert is to spare: {text.names[least]}, the least, has {share}, {equal}."
        return Advice("experts to spare", sentence, is_notable=False)
    by_layer = text.mass_share[:, spare].sum(axis=1)
    worst = int(np.argmax(by_layer))
    names = listed([text.names[expert] for expert in np.sort(spare)])
    lost_there = f"{by_layer.mean():.1%} of weights times output lengths would be lost"
    command = f"moemerge prune {analysis.model} OUT --keep {experts - len(spare)} --data NAME=PATH"
    return Advice(
        "experts to spare",
        f"{names} could go: {lost_there}, at most {by_layer[worst]:.1%}, in layer {text.layers[worst]} (`{command}`).",
        is_notable=True,
    )


def _dense_layers(_analysis: Analysis, text: TextFigures) -> Advice | None:
    """Say in which layers experts differ least: by so little, and so much less than elsewhere, that they are one.

    Experts that were fine-tuned from one base all have outputs that are nearly alike, and still differ in what they do,
    so that a cosine near 1 by itself says nothing.
    """
    values = pair_means(text.output_similarity, len(text.names))
    if np.isnan(values).all():
        return None
    middle = float(np.nanmedian(values))
    most = int(np.nanargmax(values))
    alike = np.flatnonzero((1 - values <= max(ROUNDED, _LITTLE * (1 - middle))) & (1 - values <= NEAR))
    if not len(alike):
        begin = f"No layer could as well be dense: outputs are most alike in layer {text.layers[most]}"
        told = f"with a mean cosine of {cosine(float(values[most]))}, in the middle of all layers {cosine(middle)}"
        return Advice("dense layers", f"{begin}, {told}.", is_notable=False)
    layers = [text.layers[place] for place in alike]
    least = f"all experts' outputs have a mean cosine of {cosine(float(values[alike].min()))} or more there"
    begin = (
        f"{named_layers(layers).capitalize()} could stay dense: {least}, in the middle of all layers {cosine(middle)}"
    )
    rest = [layer for layer in text.layers if layer not in layers]
    how = f"; a merge with `moe_layers: {rest}` has no experts there" if rest else ""
    return Advice("dense layers", f"{begin}{how}.", is_notable=True)


def _per_token(analysis: Analysis, text: TextFigures) -> Advice | None:
    chosen, experts = analysis.experts_per_token, len(text.names)
    if chosen == 1:
        return None
    together = mean(pair_means(text.output_similarity_chosen, experts))
    apart, of_all = 1 - together, 1 - mean(pair_means(text.output_similarity, experts))
    alike = f"have outputs with a mean cosine of {cosine(together)}, all pairs {cosine(1 - of_all)}"
    if apart <= max(ROUNDED, of_all / 2):
        sentence = f"A token's {chosen} experts do much the same: those that are chosen together {alike}."
        return Advice("experts per token", sentence, is_notable=True)
    last = float(text.choice_weight[:, chosen - 1].mean())
    is_notable = last < _SMALL_CHOICE / chosen
    begin = f"experts_per_token could be {chosen - 1}" if is_notable else f"All {chosen} experts of a token count"
    share = f"the last one has {last:.1%} of the weight, where an equal share is {1 / chosen:.1%}"
    return Advice("experts per token", f"{begin}: {share}.", is_notable)


def _lengths(_analysis: Analysis, text: TextFigures) -> Advice:
    chance, first, correlation = 1 / len(text.names), mean(text.largest_first), mean(text.norm_correlation)
    beyond = (first - chance) / (1 - chance)
    if beyond >= _FOLLOWS and correlation >= _FOLLOWS:
        begin, is_notable = "The router's choice follows output lengths", True
    elif first < chance and correlation <= -_FOLLOWS:
        begin, is_notable = "The router's choice runs against output lengths", True
    else:
        begin, is_notable = "The router's choice does not follow output lengths", False
    share = f"for {first:.1%} of tokens the first expert has the longest output (by chance {chance:.1%})"
    told = "" if np.isnan(correlation) else f", and score and length have a correlation of {correlation:.2f}"
    return Advice("output lengths", f"{begin}: {share}{told}.", is_notable)


def _token_ids(_analysis: Analysis, text: TextFigures) -> Advice | None:
    by_token, by_majority = text.by_token, text.by_majority
    if np.isnan(by_token).all():
        return None
    reads = np.flatnonzero((by_token >= _KNOWN) & (by_token - by_majority >= _FOLLOWS))
    if not len(reads):
        told = f"for {mean(by_token):.1%} of tokens their id tells the first expert, for {mean(by_majority):.1%} the "
        sentence = f"The router reads more than the token: {told}layer's most frequent expert is right."
        return Advice("tokens or context", sentence, is_notable=False)
    layers = named_layers([text.layers[place] for place in reads])
    where = "In all layers" if len(reads) == len(by_token) else f"In {layers}"
    told = f"the id alone tells the first expert of {mean(by_token[reads]):.1%} of tokens"
    rest = f"the layer's most frequent expert that of {mean(by_majority[reads]):.1%}"
    return Advice("tokens or context", f"{where} the router only reads tokens: {told}, {rest}.", is_notable=True)


def _idle(_analysis: Analysis, text: TextFigures) -> Advice:
    idle, present = dead_experts(text), ~np.isnan(text.output_norm)
    if not idle:
        shares = np.where(present, text.frequency, np.inf)
        layer, expert = np.unravel_index(int(shares.argmin()), shares.shape)
        least = f"{text.names[expert]} in layer {text.layers[layer]} takes the fewest, {shares[layer, expert]:.1%}"
        return Advice("idle experts", f"Every expert takes tokens in every layer; {least}.", is_notable=False)
    count = sum(map(len, idle.values()))
    counted = f"{count} of {present.sum()} experts over all layers take less than a tenth of an equal share of tokens"
    return Advice("idle experts", f"{counted}: {listed(_named(text, idle))}.", is_notable=True)


def _busy(_analysis: Analysis, text: TextFigures) -> Advice:
    busy, shares = super_experts(text), text.frequency
    layer, expert = np.unravel_index(int(shares.argmax()), shares.shape)
    most = f"{text.names[expert]} in layer {text.layers[layer]} takes the most, {shares[layer, expert]:.1%}"
    if not busy:
        return Advice("super experts", f"No expert does the work of a shared one; {most}.", is_notable=False)
    begin = f"Nearly all tokens choose {listed(_named(text, busy))}, which do the work of shared experts"
    return Advice("super experts", f"{begin}; {most}.", is_notable=True)


def _long(_analysis: Analysis, text: TextFigures) -> Advice | None:
    median: Numbers = np.nanmedian(text.output_norm, axis=1, keepdims=True)
    if not (median > 0).all():
        return None
    times = text.output_norm / median
    layer, expert = np.unravel_index(int(np.nanargmax(times)), times.shape)
    longest = f"{times[layer, expert]:.1f} times as long as the median, by {text.names[expert]} in layer "
    longest += f"{text.layers[layer]}"
    if times[layer, expert] < _LONG:
        return Advice("long outputs", f"No expert's outputs stand out: the longest are {longest}.", is_notable=False)
    found = {
        number: tuple(np.flatnonzero(row >= _LONG).tolist())
        for number, row in zip(text.layers, times, strict=True)
        if (row >= _LONG).any()
    }
    begin = f"Outputs of {listed(_named(text, found))} are at least {_LONG:.0f} times as long as the median there"
    return Advice("long outputs", f"{begin}; the longest are {longest}.", is_notable=True)


def _named(text: TextFigures, found: Mapping[int, tuple[int, ...]]) -> list[str]:
    """Names of experts with the layers that they were found in."""
    named = []
    for expert in sorted({expert for experts in found.values() for expert in experts}):
        layers = [layer for layer, experts in found.items() if expert in experts]
        where = "all layers" if len(layers) == len(text.layers) else named_layers(layers)
        named.append(f"{text.names[expert]} ({where})")
    return named


_OF_WEIGHTS: Final[tuple[Callable[[Analysis], Advice | None], ...]] = (_equal, _rows, _depth)
_OF_TEXT: Final[tuple[Callable[[Analysis, TextFigures], Advice | None], ...]] = (
    _dispensable, _dense_layers, _per_token, _lengths, _token_ids, _idle, _busy, _long,
)  # fmt: skip
_ORDER: Final = (
    "equal experts", "experts to spare", "idle experts", "super experts", "long outputs", "dense layers",
    "experts per token", "tokens or context", "output lengths", "depth", "router rows",
)  # fmt: skip
