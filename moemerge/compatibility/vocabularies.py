"""Vocabularies of models as their tokenizer.json has them, and how an expert's differs from the base's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError
from moemerge.passes.tokens import code_references, read_tokenizer_config
from moemerge.sources.local import resolve_file

FILE: Final = "tokenizer.json"
_OTHERS: Final = (
    "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip
_SHOWN: Final = 3
_SAVE: Final = "Save it as tokenizer.json in a copy of the model, as save_pretrained of transformers does"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a `tokenizer.json`."""

    folder: Path
    """The folder that the file is in: the model's, or an adapter's."""
    document: Mapping[str, Any]
    """The file's content."""
    ordinary: Mapping[str, int]
    """Ids of the tokens that the tokenizer's model makes of texts, without those that are added tokens, too."""
    added: Mapping[str, Mapping[str, Any]]
    """The entries of added tokens, by the token."""

    @cached_property
    def ids(self) -> dict[str, int]:
        """The ids of all tokens."""
        return {**self.ordinary, **{token: int(entry["id"]) for token, entry in self.added.items()}}

    @property
    def size(self) -> int:
        """The number after the highest id."""
        return max(self.ids.values(), default=-1) + 1


def read_vocabulary(folders: Sequence[Path]) -> Vocabulary | str | None:
    """Read the vocabulary of a model; a returned text says why it cannot be read, None that there is no tokenizer.

    Args:
        folders: the model's folder, then those of its adapters; the last one that has a tokenizer counts.
    """
    for folder in reversed(folders):
        found = _read(folder)
        if found is not None:
            return found
    return None


def _read(folder: Path) -> Vocabulary | str | None:
    if (folder / FILE).is_file():
        try:
            return _vocabulary(folder, read_json(resolve_file(folder, FILE)))
        except (CheckpointError, AttributeError, KeyError, TypeError, ValueError, IndexError):
            return f"its {FILE} is damaged. Download it again"
    if code_references(read_tokenizer_config(folder)):
        return f"its tokenizer is code, which moemerge never runs. {_SAVE}"
    other = next((name for name in _OTHERS if (folder / name).is_file()), None)
    return f"has no {FILE}, only {other}. {_SAVE}" if other else None


def _vocabulary(folder: Path, document: dict[str, Any]) -> Vocabulary:
    listed = document["model"]["vocab"]
    ordinary = listed if isinstance(listed, dict) else {token: number for number, (token, *_) in enumerate(listed)}
    added = {str(entry["content"]): dict(entry) for entry in document.get("added_tokens") or []}
    ordinary = {token: number for token, number in ordinary.items() if token not in added}
    found = Vocabulary(folder, document, ordinary, added)
    if not all(isinstance(number, int) and number >= 0 for number in found.ids.values()):
        raise ValueError("ids are whole numbers")
    return found


def difference(base: Vocabulary, other: Vocabulary) -> str:
    """Say where the ordinary vocabulary of a model differs first from the base's; empty where it does not."""
    for token in (*other.ordinary, *base.ordinary):
        ours, theirs = base.ids.get(token), other.ids.get(token)
        if ours is None:
            return f"its vocabulary has {token!r:.40}, which the base's lacks"
        if theirs is None:
            return f"its vocabulary lacks {token!r:.40}, which the base's has"
        if ours != theirs:
            return f"{token!r:.40} is {theirs} in its vocabulary, {ours} in the base's"
    return ""


def elsewhere(base: Vocabulary, other: Vocabulary) -> set[int]:
    """The ids of the base's tokens that another model does not have under the same id."""
    return {number for token, number in base.ids.items() if other.ids.get(token) != number}


def lacking(base: Vocabulary, other: Vocabulary) -> list[str]:
    """The added tokens of a model that the base does not have under any id, in the order of their ids."""
    return sorted(other.added.keys() - base.ids.keys(), key=other.ids.__getitem__)


def shown(tokens: Sequence[str]) -> str:
    """Write some tokens for a message, the first of many; each in quotes, on one line and not too long."""
    words = [repr(token)[:40] for token in tokens[:_SHOWN]]
    if more := len(tokens) - len(words):
        return f"{', '.join(words)} and {more} more"
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
