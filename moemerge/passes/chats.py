"""Render chats by a model's own chat template, and mark the tokens that its messages stand for."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from moemerge.chats import Chat
from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError, RefusedError
from moemerge.printable import printable

# A letter for private use, which no text holds: it is put in a message's place to see where the template puts it.
_STAND_IN: Final = "\ue123"
# Templates that say today's date would give other tokens every day. transformers passes no functions to a template; the
# newline is not written, and what begins a line in the template still does.
_TODAY: Final = "{% macro strftime_now(layout) %}26 Jul 2024{% endmacro %}\n"
_TEMPLATE: Final = "chat_template"
_NO_TEMPLATE: Final = (
    "Choose a base model that has one (an instruct or chat model), add its chat_template.jinja, or give plain text "
    "under the key 'text'."
)
_OTHER_ROLES: Final = "Change the chat's roles or their order, or give plain text."


def has_chat_template(folder: Path) -> bool:
    """Whether a model's folder has a chat template, in a file of its own or in `tokenizer_config.json`."""
    in_json = any(_holds_template(folder / name) for name in ("tokenizer_config.json", f"{_TEMPLATE}.json"))
    own = folder / f"{_TEMPLATE}.jinja"
    return in_json or (own.is_file() and own.stat().st_size > 0)


def _holds_template(file: Path) -> bool:
    try:
        return file.is_file() and bool(read_json(file).get(_TEMPLATE))
    except CheckpointError:
        return False


def no_template(place: str, folder: Path, otherwise: str = _NO_TEMPLATE) -> RefusedError:
    """The refusal of a chat where there is no template for it; `otherwise` is what to do."""
    return RefusedError(f"{place}: is a chat, and the tokenizer of {folder} has no chat template. {otherwise}")


@dataclass(frozen=True)
class EncodedChat:
    """A chat as a template writes it, in tokens."""

    ids: list[int]
    special: list[int]
    """0 for each token of a message that counts, 1 for the others."""
    parts: list[str]
    """What of the messages that count each token stands for; the first of several tokens of a letter stands for it."""


def encode_chat(tokenizer: Any, folder: Path, chat: Chat, roles: Sequence[str]) -> EncodedChat:
    """Encode a chat; messages of `roles` count.

    Raises:
        RefusedError: there is no template, it refuses the chat, or the tokenizer does not say where tokens stand.
    """
    if not tokenizer.chat_template:
        raise no_template(chat.place, folder)
    if not tokenizer.is_fast:
        raise RefusedError(
            f"{chat.place}: is a chat, and the tokenizer of {folder} does not say which letters a token stands for. "
            "Save it as a tokenizer.json, or give plain text."
        )
    text, spans = render_chat(lambda messages: _render(tokenizer, folder, chat.place, messages), chat, roles)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special, parts, span, read = [], [], 0, 0
    for start, end in encoded["offset_mapping"]:
        while span < len(spans) and spans[span][1] <= start:
            span += 1
        counts = span < len(spans) and max(start, spans[span][0]) < min(end, spans[span][1])
        special.append(0 if counts else 1)
        if not counts:
            parts.append("")
            continue
        # Messages are shown one under the other.
        line = "\n" if read and read <= spans[span][0] else ""
        read = max(read, spans[span][0])
        parts.append(line + text[read:end])
        read = max(read, end)
    return EncodedChat(encoded["input_ids"], special, parts)


def encode_question(tokenizer: Any, folder: Path, chat: Chat, otherwise: str = "") -> list[int]:
    """Encode a chat up to where its last answer begins, or the next one if its last message is no assistant's.

    Raises:
        RefusedError: there is no template, or it refuses the chat; says what to do, which is `otherwise` if given.
    """
    if not tokenizer.chat_template:
        raise no_template(chat.place, folder, otherwise or _NO_TEMPLATE)
    asked = chat.messages[:-1] if chat.messages[-1].role == "assistant" else chat.messages
    messages = [{"role": message.role, "content": message.content} for message in asked]
    text = _render(tokenizer, folder, chat.place, messages, answered=True, otherwise=otherwise or _OTHER_ROLES)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def render_chat(
    render: Callable[[list[dict[str, str]]], str], chat: Chat, roles: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat; also gives the start and end of each message of some roles in the text, in their order.

    Templates strip messages, merge them or leave parts of them out (such as thoughts), so that they are not searched
    for: what changes when another text stands in a message's place is that message.
    """
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    text, spans, after = render(messages), [], 0
    for number, message in enumerate(messages):
        if message["role"] in roles and message["content"].strip():
            other = render([*messages[:number], message | {"content": _STAND_IN}, *messages[number + 1 :]])
            start = max(_equal(text, other), after)
            after = max(start, len(text) - _equal(text[start:][::-1], other[::-1]))
            spans.append((start, after))
    return text, [(start, end) for start, end in spans if start < end]


def _equal(first: str, second: str) -> int:
    """How many letters two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _render(
    tokenizer: Any,
    folder: Path,
    place: str,
    messages: list[dict[str, str]],
    *,
    answered: bool = False,
    otherwise: str = _OTHER_ROLES,
) -> str:
    """Render messages; with `answered`, the beginning of an assistant's message follows."""
    try:
        template = tokenizer.get_chat_template()
        template = _TODAY + template if "strftime_now" in template else template
        write = partial(
            tokenizer.apply_chat_template, chat_template=template, tokenize=False, add_generation_prompt=answered
        )
        text: str = write(messages)
        if not _says_questions(text, messages):
            text = _in_parts(write, messages) or text
    except Exception as error:  # templates raise as they like
        said = printable(" ".join(str(error).split())).rstrip(".")
        raise RefusedError(f"{place}: the chat template of {folder} refuses it: {said:.200}. {otherwise}") from error
    return text


def _in_parts(write: Callable[[list[dict[str, Any]]], str], messages: Sequence[Mapping[str, str]]) -> str:
    """Render messages whose text is one part of each, as in multimodal models; empty if that fails."""
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    with suppress(Exception):  # templates raise as they like
        if _says_questions(text := write(parts), messages):
            return text
    return ""


def _says_questions(text: str, messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether a template has written what users say."""
    return all(message["content"].strip() in text for message in messages if message["role"] == "user")
