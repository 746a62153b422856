"""Experts that are chosen together: groups, of which some routers choose the best first, and copies of one expert."""

from collections import Counter
from collections.abc import Iterator, Sequence

from moemerge.editing.slots import Kept, Slot
from moemerge.families.stored_mixture import StoredMixture


def group_warnings(mixture: StoredMixture, slots: Sequence[Slot]) -> Iterator[str]:
    """Warn if the router chooses among groups, and these do not hold the experts that they held."""
    groups = mixture.choosing.groups
    if groups in {1, mixture.choosing.chosen_groups} or len(slots) % groups:
        return
    size, fewer = mixture.experts // groups, len(slots) // groups
    old = {frozenset(range(first, first + size)) for first in range(0, mixture.experts, size)}
    for layer in mixture.moe_layers:
        numbers = [slot.numbers[layer] if isinstance(slot, Kept) else -1 for slot in slots]
        if {frozenset(numbers[first : first + fewer]) for first in range(0, len(numbers), fewer)} != old:
            yield (
                f"its router first chooses among {groups} groups of experts that follow each other (n_group), and "
                "these are other experts now: tokens go to other experts than before, even where both are still there"
            )
            return


def twin_warnings(mixture: StoredMixture, slots: Sequence[Slot], experts_per_token: int) -> Iterator[str]:
    """Warn if an expert is there several times and takes the places of others among the chosen ones."""
    counted = Counter(tuple(slot.numbers.items()) for slot in slots if isinstance(slot, Kept))
    most = max(counted.values(), default=1)
    if most > 1 and experts_per_token < most * mixture.experts_per_token:
        numbers = next(dict(key) for key, count in counted.items() if count == most)
        name = mixture.names[next(iter(numbers.values()))]
        yield (
            f"{name} is there {most} times with the same router row: its copies are chosen together, and take "
            f"places of other experts. With {most * mixture.experts_per_token} experts per token none is lost"
        )


def parted_warnings(mixture: StoredMixture, slots: Sequence[Slot], experts_per_token: int, parts: int) -> Iterator[str]:
    """Warn if experts were split, and an edit leaves out a part, or lets tokens choose some parts of an expert alone.

    Args:
        mixture: the mixture that is edited.
        slots: the experts of the result.
        experts_per_token: how many of them take each token.
        parts: the number of parts that each expert was split into; 1 for none.
    """
    counted = Counter(slot.numbers[mixture.moe_layers[0]] // parts for slot in slots if isinstance(slot, Kept))
    if parts > 1 and (experts_per_token % parts or any(count % parts for count in counted.values())):
        yield (
            f"the experts of this mixture are {parts} parts each of those that it was split from (granularity), and "
            "only all parts of one compute what it did: leave out, and let tokens choose, all of them together"
        )
