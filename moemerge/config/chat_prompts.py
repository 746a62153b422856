"""Prompts of a config, which are texts or chats, and what is wrong with them."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

from pydantic_core import PydanticCustomError, PydanticKnownError

from moemerge.chats import (
    CHAT_KEYS,
    MESSAGE_KEYS,
    MOST_MESSAGES,
    RECORD_KEYS,
    ROLES,
    SHAREGPT_ROLES,
    Chat,
    ChatError,
    Document,
    chat_keys,
    read_chat,
)
from moemerge.places import Place

_CONTENT: Final = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
MESSAGES_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MOST_MESSAGES,
    "items": {
        "type": "object",
        "anyOf": [
            {"properties": {"role": {"enum": [*ROLES]}, "content": _CONTENT}, "required": ["role", "content"]},
            {
                "properties": {"from": {"enum": [*SHAREGPT_ROLES, *ROLES]}, "value": _CONTENT},
                "required": ["from", "value"],
            },
        ],
    },
}
"""The JSON Schema of a chat's messages."""
_TEXT: Final = {"type": "string"}
_TURNS: Final = {"anyOf": [_TEXT, MESSAGES_SCHEMA]}
_CHATS: Final[dict[tuple[str, ...], dict[str, Any]]] = {
    ("messages",): {"messages": MESSAGES_SCHEMA},
    ("conversations",): {"conversations": MESSAGES_SCHEMA},
    ("prompt", "completion"): {"prompt": _TURNS, "completion": _TURNS},
    ("instruction", "output"): {"instruction": _TEXT, "output": _CONTENT, "input": {"type": ["string", "null"]}},
}
PROMPT_SCHEMA: Final[dict[str, Any]] = {
    "description": "A text in quotes, or a chat: messages with role and content.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        *(
            {
                "type": "object",
                "properties": {key: _CHATS[keys].get(key, True) for key in RECORD_KEYS},
                "required": [*keys],
                "additionalProperties": False,
            }
            for keys in CHAT_KEYS
        ),
    ],
}
"""The JSON Schema of a prompt: a text, or a chat as `moemerge.chats.read_chat` reads it."""


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
