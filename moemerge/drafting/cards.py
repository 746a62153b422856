"""What a model's name and model card say of what it is for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moemerge.config.expert_names import expert_names
from moemerge.errors import RefusedError
from moemerge.model_card.metadata import read_metadata
from moemerge.sources.model_folder import ModelFolder

_CHAT_WORDS: Final = {"instruct", "chat", "it", "dpo", "sft", "rlhf", "orpo", "assistant"}
# `CodeNinja`, `SQLCoder`, `Llama3`.
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_LONGEST: Final = 200
_MOST: Final = 100


@dataclass(frozen=True)
class CardMetadata:
    """A model's name and the metadata of its card."""

    name: str
    tags: tuple[str, ...] = ()
    """Tags, and the task that the Hub calls its pipeline."""
    data_sets: tuple[str, ...] = ()
    languages: frozenset[str] = frozenset()
    bases: tuple[str, ...] = ()
    """Models that it was trained from, as its card says."""

    @property
    def chats(self) -> bool:
        """Whether its name says that it was trained to chat."""
        return bool(_CHAT_WORDS.intersection(words_of(self.name)[0]))


def read_card(model: ModelFolder) -> CardMetadata:
    """Read what a model says of itself; of a model with adapters, what its last adapter says."""
    folder = model.adapters[-1].folder if model.adapters else model.folder
    card = _metadata(folder / "README.md")
    return CardMetadata(
        name=expert_names([model.reference])[0],
        tags=(*_texts(card.get("tags")), *_texts(card.get("pipeline_tag"))),
        data_sets=tuple(_texts(card.get("datasets"))),
        languages=frozenset(language.lower() for language in _texts(card.get("language"))),
        bases=tuple(_texts(card.get("base_model"))),
    )


def words_of(text: str) -> tuple[list[str], list[str]]:
    """The words of a name in small letters: once as capitals and digits divide them, once as punctuation does."""
    return [word.lower() for word in _WORD.findall(text)], [word.lower() for word in re.findall(r"[^\W_]+", text)]


def _metadata(card: Path) -> dict[str, Any]:
    try:
        return read_metadata(card)
    except RefusedError:  # of a card that somebody else wrote
        return {}


def _texts(value: Any) -> Iterator[str]:
    """The short texts of a value that should be a text or a list of them."""
    listed = value if isinstance(value, list) else [value]
    yield from (text for text in listed[:_MOST] if isinstance(text, str) and len(text) <= _LONGEST)
