"""The text that says what the experts of an edited mixture are for."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from moemerge.chats import Document
from moemerge.config.router_methods import AUTO
from moemerge.config.schema import Expert, MergeConfig, RoutedExpert
from moemerge.editing.slots import Kept, Slot
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


def documents_of(config: MergeConfig, number: int, slot: Slot) -> list[Document]:
    """Read the text of an expert; of one that the mixture has already, as much of it as is still there.

    Raises:
        RefusedError: a file that a new expert's text is in is not there, or holds no text.
        SourceError: a data set on the Hub cannot be reached.
    """
    expert: RoutedExpert = config.experts[number]
    if isinstance(slot, Kept):
        return readable_documents(expert)
    place = f"experts[{number}].positive_texts"
    return [*expert.positive_prompts, *read_documents(find_files(expert.positive_texts, place))]


def unread_text(config: MergeConfig, slots: Sequence[Slot]) -> Iterator[str]:
    """Yield what lacks text in an edit whose new experts' rows are fitted, as warnings."""
    names, kept = config.expert_names, [n for n, slot in enumerate(slots) if isinstance(slot, Kept)]
    new = [number for number in range(len(slots)) if number not in kept]
    if not new or config.gate_mode != AUTO:
        return
    if not any(readable_documents(config.experts[number]) for number in kept):
        yield (
            "no text of the experts that stay is known, so new rows are fitted beside neutral text alone, and may take "
            "tokens that are not theirs: give some with --text NAME=PATH, also for experts that stay"
        )
    silent = [names[number] for number in new if not config.experts[number].is_described]
    if silent:
        yield (
            f"{', '.join(silent)}: nothing says which text is for it, so its router rows come from its weights alone: "
            "give prompts or texts with --prompt and --text"
        )
    negative = [names[number] for number in new if config.experts[number].negative_prompts]
    negative += [names[number] for number in new if config.experts[number].negative_texts]
    if negative:
        yield f"{negative[0]}: its negative prompts and texts are not read: new rows are fitted to positive text alone"
