"""The text that says what the experts of an edited mixture are for."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from moemerge.chats import Document
from moemerge.config.router_methods import AUTO
from moemerge.config.schema import Expert, MergeConfig
from moemerge.editing.slots import Added, Kept, Slot
from moemerge.errors import MoemergeError
from moemerge.texts.documents import find_files, matching_files, read_documents


def readable_documents(expert: Expert) -> list[Document]:
    """Read the positive prompts and texts that a config names for an expert, without files that are gone or faulty.

    Data sets on the Hub are left out too.
    """
    found: list[Document] = list(expert.positive_prompts)
    for file in matching_files(expert.positive_texts):
        with suppress(MoemergeError):
            found += read_documents([file])
    return found


def described(config: MergeConfig, slots: Sequence[Slot], before: MergeConfig | None) -> list[Expert]:
    """What says which text each expert is for: the config, or of one that stays, the config of the mixture before.

    Args:
        config: the edit.
        slots: its experts.
        before: the config that the mixture was made from, where its folder keeps one.
    """
    found: list[Expert] = []
    for expert, slot in zip(config.experts, slots, strict=True):
        numbers = set(slot.numbers.values()) if isinstance(slot, Kept) else set()
        parts = before.granularity if before else 1
        own = before and not expert.is_described and len(numbers) == 1 and max(numbers) < len(before.experts) * parts
        found.append(before.experts[numbers.pop() // parts] if before and own else expert)
    return found


def documents_of(experts: Sequence[Expert], slots: Sequence[Slot]) -> list[list[Document]]:
    """Read the text of each expert; of one that the mixture has already, as much of it as is still there.

    Raises:
        RefusedError: a file that a new expert's text is in is not there, or holds no text.
        SourceError: a data set on the Hub cannot be reached.
    """
    found = []
    for number, (expert, slot) in enumerate(zip(experts, slots, strict=True)):
        if isinstance(slot, Kept):
            found.append(readable_documents(expert))
            continue
        files = find_files(expert.positive_texts, f"experts[{number}].positive_texts")
        found.append([*expert.positive_prompts, *read_documents(files)])
    return found


def unread_text(config: MergeConfig, experts: Sequence[Expert], slots: Sequence[Slot]) -> Iterator[str]:
    """Yield what lacks text in an edit whose new experts' rows are fitted, as warnings.

    Args:
        config: the edit.
        experts: what says which text each expert is for; see `described`.
        slots: the experts of the result.
    """
    names, kept = config.expert_names, [n for n, slot in enumerate(slots) if isinstance(slot, Kept)]
    new = [number for number in range(len(slots)) if number not in kept]
    fitted = [number for number in new if isinstance(slots[number], Added)]
    if not new or config.gate_mode != AUTO:
        return
    if fitted and not any(readable_documents(experts[number]) for number in kept):
        yield (
            "no text of the experts that stay is known, so new rows are fitted beside neutral text alone, and may take "
            "tokens that are not theirs: give them positive_texts (--text NAME=PATH)"
        )
    if silent := [names[number] for number in fitted if not experts[number].is_described]:
        yield (
            f"nothing says which text is for {', '.join(silent)}, so the router rows come from weights alone: give "
            "positive_prompts or positive_texts (--prompt, --text)"
        )
    moved = [number for number in new if number not in fitted]
    if moved and not all(any(experts[n].is_described for n in part) for part in (kept, moved)):
        yield (
            f"text is not known of both mixtures' experts, so {', '.join(names[number] for number in moved)} keep "
            "router rows that were made beside others, and may take too many tokens or too few: give positive_texts"
        )
    negative = [names[number] for number in new if config.experts[number].negative_prompts]
    negative += [names[number] for number in new if config.experts[number].negative_texts]
    if negative:
        yield f"{negative[0]}: its negative prompts and texts are not read: new rows are fitted to positive text alone"
