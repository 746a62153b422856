"""Turn the prompts and texts of a config into tokens, by the base model's own tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from moemerge.chats import Chat, Document, as_chat, shown
from moemerge.config.schema import Expert, MergeConfig, RouterSettings
from moemerge.errors import RouterError
from moemerge.passes.tokens import Encode, by_tokenizers, by_transformers, counted_mask, cut_windows
from moemerge.texts.documents import find_files, read_documents

SHARED: Final = -1
"""Stands for the shared experts, which are one FFN, in place of an expert's number."""
UNSORTED: Final = -2
"""Stands for text that is not sorted by expert, in place of an expert's number."""
# Longer windows would leave fewer documents within a given number of tokens.
WINDOW: Final = 512
NEUTRAL: Final = -3
"""In the place of an expert's number: moemerge's own text, which is for no expert."""
SEQUENCES: Final = 64
"""Sequences that an expert writes; its prompts take turns."""
NEW_TOKENS: Final = 64
"""Most tokens of each sequence; each is a pass over the expert's weights."""
LONGEST_START: Final = 128
"""Most tokens of a prompt that an expert continues."""
# For methods that need any text: beside the config's, or where it has none.
_NO_PROMPTS: Final = "to merge without prompts, choose gate_mode random"
NEUTRAL_TEXT: Final = (
    "In the morning the train was late again, so Maria read the report that her colleague had sent: sales had grown "
    'by 12.5 % in the third quarter, mostly in the north. "What should we do about the rest?" she asked.',
    "To install the program, unpack the archive and run the following command in its folder:\n\n"
    "    make && make install\n\nfor (int i = 0; i < n; i++) { sum += values[i]; }\nreturn sum / n",
    "The area of a circle of radius r is pi * r^2. If r = 3, it is about 28.27; how large is the circumference?",
    "Le soir, ils parlaient de leur voyage. Die Stadt liegt an einem Fluss. La casa es pequeña y blanca.",
)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, or a window of a document, as tokens of the base model."""

    expert: int
    """Number of the expert, `SHARED`, `UNSORTED` or `NEUTRAL`."""
    positive: bool
    ids: tuple[int, ...]
    """Token ids, with the special tokens that the tokenizer adds."""
    counted: tuple[bool, ...]
    """Which tokens count in statistics; of a chat, those of messages whose roles count."""
    document: int = 0
    """Number of the document, shared by all its windows."""

    @property
    def counted_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that count."""
        return tuple(token for token, counts in zip(self.ids, self.counted, strict=True) if counts)


def encode_prompts(
    folder: Path,
    config: MergeConfig,
    max_tokens: int,
    seed: int,
    *,
    shared_gate: bool = False,
    special_tokens: bool = True,
    prompts_only: bool = False,
    chat_prompts: bool = False,
) -> tuple[EncodedPrompt, ...]:
    """Encode the prompts and texts of a config; special tokens are added as the tokenizer does, but do not count.

    Chats are written by the base's own chat template, and so are plain prompts with `chat_prompts`.

    Args:
        folder: the base model's folder.
        config: the merge.
        max_tokens: the model's context length.
        seed: seed for the choice of documents.
        shared_gate: whether prompts and texts of shared experts are needed.
        special_tokens: whether tokens that do not count are needed. Without them `tokenizer.json` is enough, and
            transformers, whose import takes seconds, is needed only where there is none.
        prompts_only: whether texts in files are left out.
        chat_prompts: whether plain prompts are messages of a user.

    Raises:
        RouterError: no tokenizer, a prompt without tokens, or one longer than the context.
        RefusedError: text files are missing or cannot be read, or the chat template does not take a chat.
        SourceError: a data set on the Hub cannot be reached.
    """
    encode = _encoder(folder, config, special_tokens=special_tokens)
    encoded: list[EncodedPrompt] = []
    reader = _Reader(
        encode, max_tokens, config.router, seed, in_context=special_tokens, in_chats=special_tokens and chat_prompts
    )
    for number, expert in enumerate(config.experts):
        encoded += reader.description(expert, f"experts[{number}]", number, prompts_only=prompts_only)
    for number, shared in enumerate(config.shared_experts) if shared_gate else ():
        encoded += reader.description(shared, f"shared_experts[{number}]", SHARED, prompts_only=prompts_only)
    if not prompts_only:
        tokens = config.router.tokens_per_expert * len(config.experts)
        encoded += reader.texts(
            config.router.calibration_texts, "router.calibration_texts", UNSORTED, positive=True, tokens=tokens
        )
    if config.method.reads_neutral_text:
        encoded += reader.documents(NEUTRAL_TEXT, NEUTRAL, True, config.router.tokens_per_expert)
    elif config.method.runs_base and all(prompt.expert == SHARED for prompt in encoded):
        encoded += reader.documents(NEUTRAL_TEXT, UNSORTED, True, config.router.tokens_per_expert)
    return tuple(encoded)


def _encoder(folder: Path, config: MergeConfig, *, special_tokens: bool) -> Encode:
    """Open the base's tokenizer, by transformers where that is needed."""
    file, roles = folder / "tokenizer.json", config.router.chat_roles
    if not special_tokens and file.is_file():
        return by_tokenizers(file, roles, _NO_PROMPTS)
    # mergekit-moe writes the BOS before each prompt, whether the tokenizer adds one or not.
    return by_transformers(folder, bos_as_text=config.method.like_mergekit, roles=roles, otherwise=_NO_PROMPTS)


class _Reader:
    """Turns prompts and texts into tokens, and numbers their documents."""

    def __init__(
        self, encode: Encode, max_tokens: int, settings: RouterSettings, seed: int, *, in_context: bool, in_chats: bool
    ) -> None:
        self._encode, self._max_tokens, self._settings, self._seed = encode, max_tokens, settings, seed
        self._in_context, self._in_chats, self._documents = in_context, in_chats, 0

    def description(self, expert: Expert, place: str, number: int, *, prompts_only: bool) -> Iterator[EncodedPrompt]:
        """Yield what a config says of an expert: its prompts, and unless `prompts_only` its texts."""
        for sign in ("positive", "negative"):
            prompts: list[Document] = getattr(expert, f"{sign}_prompts")
            yield from self.prompts(prompts, f"{place}.{sign}_prompts", number, positive=sign == "positive")
            if not prompts_only:
                patterns: list[str] = getattr(expert, f"{sign}_texts")
                yield from self.texts(patterns, f"{place}.{sign}_texts", number, positive=sign == "positive")

    def prompts(
        self, prompts: Sequence[Document], place: str, expert: int, *, positive: bool
    ) -> Iterator[EncodedPrompt]:
        for index, given in enumerate(prompts):
            prompt = as_chat(given) if self._in_chats else given
            if isinstance(prompt, Chat):
                prompt = replace(prompt, place=f"{place}[{index}]")
            ids, special = self._encode(prompt)
            if len(ids) > self._max_tokens:
                raise RouterError(
                    f"{place}[{index}]: has {len(ids)} tokens, the base model's context is {self._max_tokens}: "
                    "split it."
                )
            if all(special):
                roles = f" of {', '.join(self._settings.chat_roles)}" if isinstance(prompt, Chat) else ""
                raise RouterError(
                    f"{place}[{index}]: the base model's tokenizer finds no tokens{roles} in {shown(given)}."
                )
            # An embedding does not depend on the position in a text.
            counted = counted_mask(special) if self._in_context else tuple(not added for added in special)
            yield EncodedPrompt(expert, positive, tuple(ids), counted, self._documents)
            self._documents += 1

    def texts(
        self, patterns: Sequence[str], place: str, expert: int, *, positive: bool, tokens: int = 0
    ) -> Iterator[EncodedPrompt]:
        windows = self.documents(
            read_documents(find_files(patterns, place)), expert, positive, tokens or self._settings.tokens_per_expert
        )
        if patterns and not windows:
            raise RouterError(f"{place}: the base model's tokenizer finds no tokens in these files.")
        yield from windows

    def documents(self, texts: Sequence[Document], expert: int, positive: bool, tokens: int) -> list[EncodedPrompt]:
        length = min(WINDOW, self._max_tokens - 1)
        windows = cut_windows(texts, self._encode, tokens=tokens, length=length, seed=self._seed, even=True)
        first, self._documents = self._documents, self._documents + len(texts)
        return [EncodedPrompt(expert, positive, w.ids, w.counted, first + w.document) for w in windows]
