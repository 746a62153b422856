"""Find out whether text that judges a merged model is text that its routers were made from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from moemerge.chats import Document
from moemerge.config.schema import MergeConfig
from moemerge.errors import MoemergeError
from moemerge.texts.documents import matching_files, read_documents


def seen_text_notes(config: MergeConfig | None, documents: Mapping[str, Sequence[Document]]) -> list[str]:
    """Say of each domain how many of its documents the routers have seen, whatever file they are in.

    Texts of the config that are gone, cannot be read any more or are on the Hub are left out.

    Args:
        config: the merge that made the routers; None where it is not known.
        documents: the documents that judge the model, by domain.
    """
    seen = set(_documents(config)) if config else set()
    counts = {name: sum(document in seen for document in of) for name, of in documents.items()}
    return [
        f"the routers were made from {count} of the {len(documents[name])} documents of {name}, so its figures say "
        "less of other text: judge by documents that the config does not name"
        for name, count in counts.items()
        if count
    ]


def _documents(config: MergeConfig) -> Iterator[Document]:
    """Read the texts and prompts that a config names for its routers."""
    for expert in (*config.experts, *config.shared_experts):
        yield from (*expert.positive_prompts, *expert.negative_prompts)
        yield from _texts([*expert.positive_texts, *expert.negative_texts])
    yield from _texts(config.router.calibration_texts)


def _texts(patterns: Sequence[str]) -> Iterator[Document]:
    for file in matching_files(patterns):
        with suppress(MoemergeError):
            yield from read_documents([file])
