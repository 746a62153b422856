"""Prompts of a config, which are texts or chats, and what is wrong with them."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic_core import PydanticCustomError, PydanticKnownError

from moemerge.chats import (
    MESSAGE_KEYS,
    MOST_MESSAGES,
    RECORD_KEYS,
    Chat,
    ChatError,
    Document,
    Place,
    chat_keys,
    read_chat,
)


def read_prompt(value: Any) -> Document:
    """A text as it is, a mapping as the chat that it holds; an empty chat where `prompt_problems` has found any."""
    if isinstance(value, str | Chat):
        return value
    if not isinstance(value, Mapping):
        raise PydanticKnownError("string_type")
    if not chat_keys(value):
        raise PydanticCustomError("prompt", "Expected text in quotes, or a chat: messages with role and content")
    try:
        return read_chat(value)
    except ChatError:
        return Chat(())


def plain_prompt(prompt: Document) -> Any:
    """A prompt in plain values, as YAML has them."""
    if isinstance(prompt, str):
        return prompt
    return {"messages": [{"role": message.role, "content": message.content} for message in prompt.messages]}


def prompt_problems(value: Any) -> list[tuple[Place, str]]:
    """What is wrong with a prompt that is a text or has the keys of a chat, with the places in it."""
    if isinstance(value, str):
        return [] if value.strip() else [((), "the prompt is empty")]
    if isinstance(value, Mapping) and chat_keys(value):
        try:
            chat = read_chat(value)
        except ChatError as error:
            return list(error.problems)
        problems = _unknown_keys(value)
        if chat.is_blank:
            problems.append(((), "the prompt is empty"))
        if len(chat.messages) > MOST_MESSAGES:
            problems.append(((), f"has {len(chat.messages)} messages; at most {MOST_MESSAGES} are read: split it"))
        return problems
    return []


def _unknown_keys(chat: Mapping[Any, Any]) -> list[tuple[Place, str]]:
    """Keys that a data set may have, but that mean nothing in a config."""
    named: list[tuple[Place, Any, Any]] = [((str(key),), key, RECORD_KEYS) for key in chat]
    for key in ("messages", "conversations"):
        for number, message in enumerate(chat.get(key) or ()):
            named += [((key, number, str(name)), name, MESSAGE_KEYS) for name in message]
    problems: list[tuple[Place, str]] = []
    for place, key, known in named:
        if key not in known:
            near = get_close_matches(str(key)[:60], known, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            problems.append((place, f"unknown key{hint}"))
    return problems
