"""Read a tokenizer's vocabulary for a GGUF file, from whichever of its files llama.cpp's converter reads."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.export.sentencepiece import Kind, read_pieces
from moemerge.families.splitting import pre_tokenizer_of

_MOST_BYTES: Final = 200_000_000
_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Added tokens that some models do not mark as special in their files, but use as such.
_CONTROL: Final = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", re.DOTALL)
# Tokens of Gemma 4 that a parser of chats has to see.
_VISIBLE: Final = frozenset({
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
})  # fmt: skip
_SPACE: Final = "▁"
# Scores of tokens that no merge makes; the second is for tokens that are not in the vocabulary at all.
_ADDED_SCORE: Final = -1000.0
_ABSENT_SCORE: Final = -10000.0
NAMED: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Roles of tokens that `tokenizer_config.json` names as `bos_token` and so on."""


class TokenType(IntEnum):
    """Type of a token, as GGUF files number it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """The tokens of a vocabulary, by their numbers."""

    model: str
    """The algorithm: `llama` for SentencePiece, `gpt2` for byte-level BPE."""
    pre: str
    """The name of the way in which texts are split before that."""
    tokens: list[str] = field(default_factory=list)
    types: list[TokenType] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Scores of tokens; only SentencePiece has them."""
    merges: list[str] = field(default_factory=list)
    """Merges, each as two tokens with a space between; only byte-level BPE has them."""

    def add(self, token: str, kind: TokenType, score: float = _ADDED_SCORE) -> None:
        """Add the next token."""
        self.tokens.append(token)
        self.types.append(kind)
        self.scores.append(score)


def read_gemma4_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read the vocabulary of a Gemma 4, which has pieces as SentencePiece's does, and merges too.

    Raises:
        IncompatibleError: `tokenizer.json` is of another kind.
        CheckpointError: `tokenizer.json` is damaged.
    """
    tokenizer = read_table(folder / "tokenizer.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise unknown("Gemma 4's tokenizer.json is BPE with byte fallback, and this one is not")
    found = _from_byte_fallback(folder, tokenizer, size)
    found.model, found.pre, found.merges = "gemma4", "", [_merge(pair) for pair in model.get("merges") or []]
    found.types = [
        TokenType.USER_DEFINED if token in _VISIBLE else kind
        for token, kind in zip(found.tokens, found.types, strict=True)
    ]
    return found


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read the vocabulary in a model's folder.

    Args:
        folder: the folder with `tokenizer.model` or `tokenizer.json`.
        size: the size of the vocabulary according to `config.json`.

    Raises:
        IncompatibleError: there is no vocabulary, or one of an unknown kind.
        CheckpointError: a file is damaged.
    """
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, size)
    if not (folder / "tokenizer.json").is_file():
        raise unknown("there is neither tokenizer.json nor tokenizer.model")
    tokenizer = read_table(folder / "tokenizer.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise unknown(f"tokenizer.json is of the kind {model.get('type')!r}, not BPE")
    if model.get("byte_fallback") and (tokenizer.get("decoder") or {}).get("type") == "Sequence":
        return _from_byte_fallback(folder, tokenizer, size)
    return _from_byte_level(tokenizer, size)


def unknown(what: str) -> IncompatibleError:
    """The refusal of a tokenizer that is not known."""
    return IncompatibleError(
        "The tokenizer cannot be written to a GGUF file; llama.cpp's converter may know it, with --llama-cpp PATH:",
        [what],
    )


def read_table(path: Path) -> dict[str, Any]:
    """Read a JSON object of a tokenizer; an empty one where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path.name}: is larger than {_MOST_BYTES} bytes, as no tokenizer is.")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: is not JSON ({error!s:.80}). Download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name}: expected a JSON object, found {found!r:.60}.")
    return found


def text_of(token: Any) -> str | None:
    """The text of a token in `tokenizer_config.json`: the value itself, or its `content`."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _kind_of_added(token: str, *, special: bool) -> tuple[str, TokenType]:
    """An added token's text and type; tokens that users may write get their spaces as users write them."""
    if special or _CONTROL.fullmatch(token):
        return token, TokenType.CONTROL
    return token.replace(_SPACE, " "), TokenType.USER_DEFINED


def _from_sentencepiece(folder: Path, size: int) -> Vocabulary:
    """Read `tokenizer.model`, with what `added_tokens.json` and `tokenizer_config.json` add or change."""
    kinds: dict[int, TokenType] = {
        Kind.UNKNOWN: TokenType.UNKNOWN,
        Kind.CONTROL: TokenType.CONTROL,
        Kind.UNUSED: TokenType.UNUSED,
        Kind.BYTE: TokenType.BYTE,
    }
    found = Vocabulary("llama", "default")
    for piece in read_pieces(folder / "tokenizer.model")[:size]:
        found.add(piece.text, kinds.get(piece.kind, TokenType.NORMAL), piece.score)
    while len(found.tokens) < size:
        found.add(f"[PAD{len(found.tokens)}]", TokenType.UNUSED, _ABSENT_SCORE)
    for token, number in read_table(folder / "added_tokens.json").items():
        if number < size:
            _replace(found, number, token, TokenType.USER_DEFINED)
    added = read_table(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for number, entry in added.items():
        if int(number) < size:
            _replace(found, int(number), *_kind_of_added(entry["content"], special=bool(entry.get("special"))))
    return found


def _replace(vocabulary: Vocabulary, number: int, token: str, kind: TokenType) -> None:
    vocabulary.tokens[number], vocabulary.types[number] = token, kind
    vocabulary.scores[number] = _ADDED_SCORE


def _from_byte_fallback(folder: Path, tokenizer: Mapping[str, Any], size: int) -> Vocabulary:
    """Read the `tokenizer.json` that transformers makes of a SentencePiece model, which has no scores.

    Engines want as many tokens as there are embeddings.
    """
    special = _special_texts(folder)
    found = Vocabulary("llama", "default")
    vocab = tokenizer["model"]["vocab"]
    for token, number in sorted(vocab.items(), key=lambda entry: entry[1]):
        if number != len(found.tokens):
            raise unknown(f"tokenizer.json has no token {len(found.tokens)}")
        if _BYTE.fullmatch(token):
            found.add(token, TokenType.BYTE)
        else:
            found.add(token, TokenType.CONTROL if token in special else TokenType.NORMAL)
    for entry in sorted(tokenizer.get("added_tokens") or [], key=lambda entry: entry["id"]):
        if entry["id"] >= len(vocab):
            if entry["id"] != len(found.tokens):
                raise unknown(f"tokenizer.json has no token {len(found.tokens)}")
            found.add(entry["content"], TokenType.CONTROL if entry["content"] in special else TokenType.USER_DEFINED)
    if len(found.tokens) > size:
        raise unknown(f"tokenizer.json has {len(found.tokens)} tokens, more than the {size} embeddings")
    while len(found.tokens) < size:
        found.add(f"[PAD{len(found.tokens)}]", TokenType.UNUSED, _ABSENT_SCORE)
    return found


def _special_texts(folder: Path) -> set[str]:
    """Tokens that have a role; not all that are added as special ones have."""
    config = read_table(folder / "tokenizer_config.json")
    listed = [*(config.get("additional_special_tokens") or []), *(config.get("extra_special_tokens") or [])]
    texts = [text_of(token) for token in [*(config.get(f"{name}_token") for name in NAMED), *listed]]
    return {text for text in texts if text is not None}


def _from_byte_level(tokenizer: Mapping[str, Any], size: int) -> Vocabulary:
    """Read a `tokenizer.json` of byte-level BPE."""
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens") or []}
    texts = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    texts |= {number: entry["content"] for number, entry in added.items()}
    if max(texts) >= size:
        raise unknown(f"tokenizer.json has a token {max(texts)}, but vocab_size is {size}")
    pre = pre_tokenizer_of(tokenizer)
    if pre is None:
        raise unknown(
            "how tokenizer.json splits texts is not one of the ways that are known here (its pre_tokenizer and "
            "normalizer)"
        )
    found = Vocabulary("gpt2", pre, merges=[_merge(pair) for pair in tokenizer["model"].get("merges") or []])
    for number in range(size):
        if number not in texts:
            found.add(f"[PAD{number}]", TokenType.UNUSED)
        elif number in added:
            found.add(*_kind_of_added(texts[number], special=bool(added[number].get("special"))))
        else:
            found.add(texts[number], TokenType.NORMAL)
    found.scores.clear()
    return found


def _merge(pair: str | list[str]) -> str:
    """Join two tokens with a space; a space in one of them is written as the letter that stands for it."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)
