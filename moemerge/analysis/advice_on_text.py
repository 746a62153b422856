"""What an analysis says in sentences of outputs and choices, each with the number that it rests on."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.analysis.figures import Analysis, Numbers, TextFigures
from moemerge.analysis.means import mean, pair_means
from moemerge.analysis.wording import NEAR, ROUNDED, Advice, cosine, listed, named_experts, named_layers

# Each is where a sentence says something else; the numbers stand in the sentence, for readers who would draw the line
# elsewhere.
_SMALL_CHOICE: Final = 0.5  # of what each choice would have if all had the same
_FEWEST_TOKENS: Final = 256  # of fewer, hardly an id occurs again
_FOLLOWS: Final = 0.2  # of the way from chance to certainty, and as a correlation
_KNOWN: Final = 0.9
_LITTLE: Final = 0.2  # of what experts differ by in the middle of all layers
_LONG: Final = 5.0  # times the median of the layer
_LONGER: Final = 1.05


def advise_on_dense_layers(analysis: Analysis, text: TextFigures) -> Advice | None:
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
    begin = f"{named_layers(layers).capitalize()} could be dense: {least}, in the middle of all layers {cosine(middle)}"
    rest = [layer for layer in text.layers if layer not in layers]
    dense = sorted(set(range(text.layers[-1] + 1)) - set(rest))
    can_leave = rest and analysis.merged_in and analysis.merged_in.leaves_dense(dense, rest)
    how = "; a merge whose `moe_layers` leave them out has no experts there" if can_leave else ""
    return Advice("dense layers", f"{begin}{how}.", is_notable=True)


def advise_on_choices(analysis: Analysis, text: TextFigures) -> Advice | None:
    """Say whether the last of a token's experts count."""
    experts = len(text.names)
    counts = (~np.isnan(text.choice_weight)).sum(axis=1)
    places = np.flatnonzero(counts > 1)
    if not len(places):
        return None
    chosen = f"{analysis.experts_per_token} " if (counts == analysis.experts_per_token).all() else ""
    together = mean(pair_means(text.output_similarity_chosen, experts))
    apart, of_all = 1 - together, 1 - mean(pair_means(text.output_similarity, experts))
    alike = f"have outputs with a mean cosine of {cosine(together)}, all pairs {cosine(1 - of_all)}"
    if apart <= max(ROUNDED, of_all / 2):
        sentence = f"A token's {chosen}experts do much the same: those that are chosen together {alike}."
        return Advice("experts per token", sentence, is_notable=True)
    last = text.choice_weight[places, counts[places] - 1]
    parts = last * counts[places]  # of an equal share
    is_notable = mean(parts) < _SMALL_CHOICE
    fewer = analysis.experts_per_token - 1 if chosen else "one less"
    begin = f"experts_per_token could be {fewer}" if is_notable else f"All {chosen}experts of a token count"
    equal = f"where an equal share is {mean(1 / counts[places]):.1%}"
    others = places[(parts < _SMALL_CHOICE) != is_notable]
    but = f"; {'more' if is_notable else 'less'} than half of that in {_layers(text, others)}" if len(others) else ""
    share = f"the last one has {mean(last):.1%} of the weight, {equal}{but}"
    return Advice("experts per token", f"{begin}: {share}{'' if chosen else _by_layer(text, counts)}.", is_notable)


def _layers(text: TextFigures, places: NDArray[np.int64]) -> str:
    return named_layers([text.layers[place] for place in places])


def _by_layer(text: TextFigures, counts: NDArray[np.int64]) -> str:
    """Say how many experts take a token in which layers."""
    told = [f"{count} in {_layers(text, np.flatnonzero(counts == count))}" for count in np.unique(counts)]
    return f"; layers choose {listed(told)}"


def advise_on_lengths(_analysis: Analysis, text: TextFigures) -> Advice | None:
    """Say whether routers prefer experts with long outputs."""
    if not text.mass_share.any():
        return None
    chance, first, correlation = mean(text.chance), mean(text.largest_first), mean(text.norm_correlation)
    if first - chance >= _FOLLOWS * (1 - chance) and correlation >= _FOLLOWS:
        begin, is_notable = "The router's choice follows output lengths", True
    elif first < chance and correlation <= -_FOLLOWS:
        begin, is_notable = "The router's choice runs against output lengths", True
    else:
        begin, is_notable = "The router's choice does not follow output lengths", False
    share = f"for {first:.1%} of tokens the first expert has the longest output (by chance {chance:.1%})"
    told = "" if np.isnan(correlation) else f", and score and length have a correlation of {correlation:.2f}"
    return Advice("output lengths", f"{begin}: {share}{told}.", is_notable)


def advise_on_token_ids(_analysis: Analysis, text: TextFigures) -> Advice | None:
    """Say whether the router only reads tokens."""
    by_token, by_majority = text.by_token, text.by_majority
    if np.isnan(by_token).all():
        return None
    if sum(text.tokens) < _FEWEST_TOKENS:
        sentence = (
            f"Whether the router only reads tokens takes more text: {_FEWEST_TOKENS} tokens, {sum(text.tokens)} here."
        )
        return Advice("tokens or context", sentence, is_notable=False)
    reads = np.flatnonzero((by_token >= _KNOWN) & (by_token - by_majority >= _FOLLOWS))
    if not len(reads):
        told = f"of tokens whose id occurs again, it tells the first expert of {mean(by_token):.1%}, and for "
        told += f"{mean(by_majority):.1%} the "
        sentence = f"The router reads more than the token: {told}layer's most frequent expert is right."
        return Advice("tokens or context", sentence, is_notable=False)
    layers = named_layers([text.layers[place] for place in reads])
    where = "In all layers" if len(reads) == len(by_token) else f"In {layers}"
    told = f"the id alone tells the first expert of {mean(by_token[reads]):.1%} of tokens whose id occurs again"
    rest = f"the layer's most frequent expert that of {mean(by_majority[reads]):.1%}"
    return Advice("tokens or context", f"{where} the router only reads tokens: {told}, {rest}.", is_notable=True)


def advise_on_long_outputs(_analysis: Analysis, text: TextFigures) -> Advice | None:
    """Say whose outputs are much longer than others'."""
    median: Numbers = np.nanmedian(text.output_norm, axis=1, keepdims=True)
    if not (median > 0).all():
        return None
    times = text.output_norm / median
    layer, expert = np.unravel_index(int(np.nanargmax(times)), times.shape)
    longest = f"{times[layer, expert]:.1f} times the median length, by {text.names[expert]} in layer "
    longest += f"{text.layers[layer]}"
    if times[layer, expert] < _LONG:
        told = (
            f"the longest are {longest}"
            if times[layer, expert] >= _LONGER
            else "none is longer than 1.05 times the median"
        )
        return Advice("long outputs", f"No expert's outputs stand out: {told}.", is_notable=False)
    found = {
        number: tuple(np.flatnonzero(row >= _LONG).tolist())
        for number, row in zip(text.layers, times, strict=True)
        if (row >= _LONG).any()
    }
    named = listed(named_experts(text.names, text.layers, found))
    begin = f"Outputs of {named} are at least {_LONG:.0f} times as long as the median there"
    return Advice("long outputs", f"{begin}; the longest are {longest}.", is_notable=True)
