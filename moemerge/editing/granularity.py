"""Every expert split into narrower ones that are always chosen together: the same function, in finer grains.

A router whose rows stand there G times gives G equal logits for each expert, so that of G times as many experts G
times as many are chosen: the parts of those that were chosen before. What an expert adds is the sum of what its parts
add, if each part has the weight that the expert had. Weights that are divided by the sum of all, or of the chosen
ones, are a G-th of it, which a factor of G on the down projections makes good; sigmoids that are not divided stay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moemerge.editing.slots import Added, Kept, Slot
from moemerge.families.stored_mixture import StoredMixture, per_token_key


def split(slots: Sequence[Slot], mixture: StoredMixture, parts: int) -> list[Slot]:
    """Split every expert into `parts` parts, which follow each other."""
    factor = parts if weights_are_shared(mixture) else 1
    return [replace(slot, part=part, parts=parts, scale=slot.scale * factor) for slot in slots for part in range(parts)]


def split_problems(slots: Sequence[Slot], mixture: StoredMixture, parts: int) -> Iterator[str]:
    """Yield why experts cannot be split so; nothing where `parts` is 1."""
    if parts == 1:
        return
    widths = {
        width: slot
        for slot in slots
        for width in (slot.own.model.ffn_widths if isinstance(slot, Added) else [slot.width(mixture)])
    }
    for width, slot in widths.items():
        if width % parts:
            whose = "the mixture's experts have" if isinstance(slot, Kept) else f"{slot.place} has"
            yield f"granularity: {whose} {width} neurons, which {parts} does not divide"
    shared = mixture.family.shared
    if shared and shared.width == "one expert":
        yield (
            f"granularity: a {mixture.family.model_type} has one shared expert that is as wide as the others, and "
            f"would be {parts} times as wide"
        )
    yield from _group_problems(mixture)


def copies_problems(mixture: StoredMixture) -> Iterator[str]:
    """Yield why experts cannot be there several times, with all copies of an expert chosen together."""
    yield from _group_problems(mixture)
    if mixture.family.selection_bias and mixture.choosing.scoring == "softmax":
        yield (
            f"a {mixture.family.model_type} adds biases to a softmax over all experts for the choice, which would be "
            "the same beside smaller numbers"
        )
    given = mixture.config[per_token_key(mixture.family)]
    if isinstance(given, list) and len(set(given)) > 1:
        yield (
            f"its layers differ in how many experts take each token, {min(given)} to {max(given)}, and the result's "
            "would not"
        )


def _group_problems(mixture: StoredMixture) -> Iterator[str]:
    how = mixture.choosing
    if 1 < how.groups != how.chosen_groups and how.best_of_group > 1:
        yield (
            f"its router chooses among {how.groups} groups of experts (n_group) by the two highest scores in each, "
            "which would be those of one expert's parts or copies"
        )


def split_notes(mixture: StoredMixture, parts: int) -> Iterator[str]:
    """Notes on what splitting costs in exactness; nothing where `parts` is 1."""
    if parts == 1:
        return
    dtype = mixture.projection(mixture.moe_layers[0], 0, "down").dtype
    if parts & (parts - 1) and dtype != "F32" and weights_are_shared(mixture):
        yield (
            f"granularity: {parts} times the down projections is rounded to {dtype}; with a power of two, the numbers "
            "stay exact"
        )
    yield (
        "granularity: equal logits keep the parts of an expert together. Where two experts' logits are equal at the "
        "border of the chosen ones, transformers on a CPU and llama.cpp may choose parts of both: for about 1 token in "
        "5000 of a layer in bfloat16, hardly ever in float32"
    )


def bias_factor(mixture: StoredMixture, parts: int) -> float:
    """The factor on selection biases: a softmax over the parts gives each of them a part of its expert's score."""
    return 1.0 if mixture.choosing.scoring == "sigmoid" else 1 / parts


def weights_are_shared(mixture: StoredMixture) -> bool:
    """Whether the weights of one token's experts add up to a number that does not depend on how many there are."""
    return mixture.choosing.normalises or mixture.choosing.scoring == "softmax"
