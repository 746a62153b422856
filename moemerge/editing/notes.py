"""Notes on the plan of an edit, for its user."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from moemerge.checkpoint.derived import kinds_of
from moemerge.dtypes import bytes_of
from moemerge.editing.granularity import split_notes
from moemerge.editing.slots import Added, Kept, Slot
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.quantised_notes import was_stored_as

# What torch's grouped matrix product asks of a row on a CPU.
_ROW_BYTES: Final = 16


def edit_notes(
    mixture: StoredMixture, slots: Sequence[Slot], width: int, parts: int, *, computes: bool
) -> Iterator[str]:
    """Yield what a user should know of an edit.

    Args:
        mixture: the mixture that is edited.
        slots: the experts of the result, before they are split.
        width: the neurons of each, or of each part.
        parts: the number of parts that each is split into.
        computes: whether router rows are computed.
    """
    kept = {number for slot in slots if isinstance(slot, Kept) for number in slot.made_of()}
    dropped = [name for number, name in enumerate(mixture.names) if number not in kept]
    if dropped and not computes:
        yield (
            f"{', '.join(dropped)}: left out; tokens that chose {'it' if len(dropped) == 1 else 'them'} now take what "
            "they would have chosen next, since the other router rows stay as they are"
        )
        if not mixture.choosing.normalises and mixture.choosing.scoring == "softmax":
            yield (
                "its router weighs experts by a softmax over all of them, and does not divide the chosen ones' weights "
                "by their sum: those that stay weigh more now, for all tokens"
            )
    whole = width * parts
    if whole > mixture.expert_width and any(isinstance(slot, Kept) for slot in slots):
        yield (
            f"the mixture's experts have {mixture.expert_width} neurons and are padded with zeros to {whole}, which "
            "changes nothing that they compute"
        )
    narrow = [slot.place for slot in slots if not isinstance(slot, Kept) and slot.width(mixture) < whole]
    if narrow:
        yield f"padded with neurons of zeros to {whole}: {', '.join(narrow)}"
    yield from split_notes(mixture, parts)
    yield from _notes_on_new(mixture, slots)
    dtype = mixture.projection(mixture.moe_layers[0], 0, "down").dtype
    if width != mixture.expert_width and (bytes_of(dtype, (width,)) or 0) % _ROW_BYTES:
        yield (
            f"experts have {width} neurons: transformers 5 multiplies experts on a CPU only if a row of them takes a "
            f"multiple of {_ROW_BYTES} bytes; elsewhere, multiples of 64 or more are fast"
        )


def _notes_on_new(mixture: StoredMixture, slots: Sequence[Slot]) -> Iterator[str]:
    """Yield what a user should know of the experts that are new in a mixture."""
    ours = _residual_multiplier(mixture.config)
    for slot in slots:
        if isinstance(slot, Kept):
            continue
        if isinstance(slot, Added):
            yield from (f"{slot.place}: {was_stored_as(kind)}" for kind in kinds_of(slot.own.tensors.values()))
        theirs = _residual_multiplier(slot.own.model.config if isinstance(slot, Added) else slot.other.config)
        if theirs != ours:
            yield (
                f"{slot.place}: residual_multiplier is {theirs:g} where it comes from, but the mixture's {ours:g} will "
                f"scale its FFNs; residual_scale: {theirs / ours:g} makes up for it"
            )


def _residual_multiplier(config: Mapping[str, Any]) -> float:
    """The factor on what each layer adds to the hidden state."""
    return float(config.get("residual_multiplier", 1.0))
