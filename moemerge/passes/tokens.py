"""Turn text into tokens with a model's own tokenizer, in windows that a pass can read."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from moemerge.chats import COUNTED_ROLES, Chat, Document, shortened
from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError, RefusedError, RouterError
from moemerge.passes.chats import encode_chat
from moemerge.printable import printable

Encode = Callable[[Document], tuple[list[int], list[int]]]
"""A function from a document to its tokens, with a 0 or 1 for each: 1 if it does not count.

The tokenizer added it; of a chat, it is the template's, or of a role that does not count.
"""

# Characters read of each document; tokens are seldom longer than a few characters.
_DOCUMENT_CHARACTERS: Final = 100_000
_SHORTEST: Final = 8
_EVEN_LENGTH: Final = 64
CHARACTERS_PER_TOKEN: Final = 64
"""Most characters read for a token. Tokens of text have about four; longer documents make up for shorter ones."""
_SHOWN: Final = 8
_SENTENCEPIECE: Final = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Window:
    """A run of a document's tokens, as a model reads it."""

    document: int
    ids: tuple[int, ...]
    """Token ids, with the special tokens that the tokenizer puts in front of every text."""
    counted: tuple[bool, ...]
    """Whether each token counts in statistics; see `counted_mask`."""

    @property
    def scored(self) -> tuple[bool, ...]:
        """Whether each token's loss counts, without the first token, which nothing predicts."""
        return self.counted[1:]


def count_scored(windows: Iterable[Window]) -> int:
    """Count the tokens of some windows whose loss counts."""
    return sum(sum(window.scored) for window in windows)


def load_tokenizer(folder: Path, otherwise: str = "") -> Any:
    """Load the tokenizer of a model's folder, as transformers makes it.

    Args:
        folder: the model's folder.
        otherwise: what messages say to do without a tokenizer, if anything can be done.

    Raises:
        RouterError: no tokenizer can be loaded.
    """
    with _explained(folder, otherwise):
        return auto_tokenizer(folder)


def auto_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model's folder; its errors are those of transformers."""
    from transformers import AutoTokenizer, PretrainedConfig

    load = partial(AutoTokenizer.from_pretrained, folder, local_files_only=True, trust_remote_code=False)
    try:
        return load()
    except AttributeError:  # transformers 5 fails on longrope in the config.json of types that it does not know
        return load(config=PretrainedConfig())


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read a folder's `tokenizer_config.json`; empty if there is none that can be read."""
    path = folder / "tokenizer_config.json"
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def code_references(config: Mapping[str, Any]) -> list[str]:
    """The names in `auto_map` of a tokenizer's config: classes as `file.Class`, or `user/name--file.Class`."""
    found = config.get("auto_map")
    values = list(found.values()) if isinstance(found, dict) else [found]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(one for one in flat if isinstance(one, str)))


def listed(names: Iterable[str]) -> str:
    """Join names from untrusted files to a text that is short enough for a message."""
    shown = [f"{printable(name):.80}" for name in names]
    return ", ".join(shown[:_SHOWN]) + (" ..." if shown[_SHOWN:] else "")


def why_unreadable(folder: Path, error: Exception) -> tuple[str, str]:
    """Explain why transformers makes no tokenizer of a folder, and what to do about it."""
    if references := code_references(read_tokenizer_config(folder)):
        return (
            f"is code of its repository ({listed(references)}), which moemerge never runs",
            "save it as a tokenizer.json in a copy of the model",
        )
    absent = [package for package in ("sentencepiece", "google.protobuf") if not _is_installed(package)]
    pieces = [name for name in _SENTENCEPIECE if (folder / name).is_file()]
    if absent and pieces and not (folder / "tokenizer.json").is_file():
        packages = [package.removeprefix("google.") for package in absent]
        why = (
            f"is a {pieces[0]}, and {' and '.join(packages)} to read it {'are' if packages[1:] else 'is'} not installed"
        )
        return why, f"pip install {' '.join(packages)}"
    has_files = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", *_SENTENCEPIECE))
    return f"cannot be used ({error_line(error)})", f"{'mend' if has_files else 'add'} the tokenizer's files"


def error_line(error: Exception) -> str:
    """Shorten another library's error of many lines to one short line."""
    return f"{type(error).__name__}: {printable(' '.join(str(error).split())):.160}"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # nor is the package above it
        return False


@contextmanager
def _explained(folder: Path, otherwise: str) -> Iterator[None]:
    try:
        yield
    except RefusedError:  # which is of the text
        raise
    except Exception as error:  # each tokenizer class raises in its own way
        why, step = why_unreadable(folder, error)
        step += f", or, {otherwise}" if otherwise else ""
        raise RouterError(f"{folder}: the model's tokenizer {why}. Text needs it: {step}.") from error


def by_transformers(
    folder: Path, *, bos_as_text: bool = False, roles: Sequence[str] = COUNTED_ROLES, otherwise: str = ""
) -> Encode:
    """Load a tokenizer as transformers makes it; special tokens are added, or with `bos_as_text` the BOS alone.

    Chats are rendered by its chat template, and their messages of `roles` count; for `otherwise` see `load_tokenizer`.

    Raises:
        RouterError: no tokenizer can be loaded.
    """
    tokenizer = load_tokenizer(folder, otherwise)

    def encode(text: Document) -> tuple[list[int], list[int]]:
        with _explained(folder, otherwise):
            if isinstance(text, Chat):
                chat = encode_chat(tokenizer, folder, text, roles)
                return chat.ids, chat.special
            if bos_as_text:
                whole = (tokenizer.bos_token or "") + text
                ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
                return ids, [int(place == 0 and token == tokenizer.bos_token_id) for place, token in enumerate(ids)]
            result = tokenizer(text, return_special_tokens_mask=True, verbose=False)
            return result["input_ids"], result["special_tokens_mask"]

    return encode


def by_tokenizers(file: Path, roles: Sequence[str] = COUNTED_ROLES, otherwise: str = "") -> Encode:
    """Load a tokenizer from `tokenizer.json` alone; no special tokens are added, nor a template to messages of `roles`.

    Raises:
        RouterError: the file cannot be loaded.
    """
    with _explained(file.parent, otherwise):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: Document) -> tuple[list[int], list[int]]:
        said = text.said_by(roles) if isinstance(text, Chat) else text
        ids = tokenizer.encode(said, add_special_tokens=False).ids
        return ids, [0] * len(ids)

    return encode


def counted_mask(special: Sequence[int]) -> tuple[bool, ...]:
    """Mark the tokens that count in statistics: those of the text itself, without the first token of the sequence.

    The first token, BOS or not, gathers attention (an attention sink, https://arxiv.org/abs/2309.17453): its
    states are far from all others and would outweigh the text in an average. The only token of a text has to count.
    """
    counted = [not added for added in special]
    if counted[0] and sum(counted) > 1:
        counted[0] = False
    return tuple(counted)


def cut_windows(
    documents: Sequence[Document],
    encode: Encode,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    even: bool = False,
    first: Sequence[int] = (),
) -> list[Window]:
    """Cut windows from documents, one of each in every round, until there are enough tokens.

    Windows of a chat hold its template's tokens too; one without a token that counts is left out.

    Args:
        documents: the texts and chats; at most 100 000 characters of each are read.
        encode: the tokenizer.
        tokens: how many tokens are wanted in all, without those that the tokenizer adds, or a template before a chat's
            first message that counts.
        length: the most tokens in a window, without those that the tokenizer adds.
        seed: decides which documents come first.
        even: whether windows are shortened so that every document has one, as long as they keep 64 tokens.
        first: the most tokens in each of the first windows, where that is less.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)  # noqa: S311  no secret
    longest = length
    if even:
        length = min(length, max(_EVEN_LENGTH, tokens // max(len(documents), 1)))
    # Documents beyond these would give nothing, and neither would text beyond this in each of them.
    order = order[: max(tokens // (_EVEN_LENGTH if even else _SHORTEST), 1)]
    characters = min(_DOCUMENT_CHARACTERS, CHARACTERS_PER_TOKEN * max(length, tokens // max(len(order), 1)))
    encoded = [(document, *_split(shortened(documents[document], characters), encode)) for document in order]
    windows: list[Window] = []
    left, starts = tokens, [0] * len(encoded)
    while left > 0 and any(len(ids) > start for start, (_, _, ids, _) in zip(starts, encoded, strict=True)):
        for place, (document, added, ids, special) in enumerate(encoded):
            start = starts[place]
            most = length if len(windows) >= len(first) else min(length, first[len(windows)])
            # What a template puts before a chat's first message, such as a system prompt, takes nothing from it.
            before = min(special.index(0), longest) if not start and 0 in special else 0
            end = min(start + most + before, start + longest, start + left + before)
            starts[place] = start + min(most + before, longest)
            part, uncounted = ids[start:end], special[start:end]
            # The rest of a document may be too short to say anything.
            if uncounted.count(0) >= (_SHORTEST if start else 1):
                mask = counted_mask([*[1] * len(added), *uncounted])
                windows.append(Window(document, (*added, *part), mask))
                left -= len(part) - before
    return windows


def _split(document: Document, encode: Encode) -> tuple[list[int], list[int], list[int]]:
    """Split tokens into those that the tokenizer puts in front of every text, and the document's own, with a mask."""
    ids, special = encode(document)
    first = next((index for index, added in enumerate(special) if not added), len(ids))
    if isinstance(document, str):
        own = [token for token, added in zip(ids, special, strict=True) if not added]
        return ids[:first], own, [0] * len(own)
    front = _split("a", encode)[0]
    front = front if ids[: len(front)] == front else []
    return front, ids[len(front) :], special[len(front) :]
