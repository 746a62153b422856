"""Documents: texts, and chats, which are messages of roles as data sets write them."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, get_args

from moemerge.places import Place, address

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
"""Roles that a message may have."""
COUNTED_ROLES: Final[tuple[Role, ...]] = ("user", "assistant")
"""Roles whose messages count in statistics unless something else is asked for."""
CHAT_KEYS: Final = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""Keys of records that are chats, in the order in which they are looked for; `input` may stand beside `instruction`."""
RECORD_KEYS: Final = (*(key for keys in CHAT_KEYS for key in keys), "input")
"""All keys of records that are read of chats."""
MESSAGE_KEYS: Final = ("role", "content", "from", "value")
"""Keys of messages that are read."""
# https://github.com/lm-sys/FastChat and its data call the roles so, under the key `from`.
SHAREGPT_ROLES: Final = {"human": "user", "gpt": "assistant"}
"""Other names of roles, which count under the key `from`."""
# Longer chats are few, and rendering takes the square of their number.
MOST_MESSAGES: Final = 200
"""Messages of a chat that are read."""
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """Messages that a chat template makes one text of."""

    messages: tuple[Message, ...]
    place: str = field(default="", compare=False, repr=False)
    """Where it stands, for messages about it: a file and line, or an address in a config."""

    @property
    def is_blank(self) -> bool:
        """Whether nobody says anything."""
        return not any(message.content.strip() for message in self.messages)

    def said_by(self, roles: Sequence[str]) -> str:
        """The contents of all messages of some roles, with an empty line between them."""
        return "\n\n".join(message.content for message in self.messages if message.role in roles)

    def shortened(self, characters: int) -> "Chat":
        """The chat up to so many characters of its messages, the last of which may be cut, and at most 200 messages."""
        kept: list[Message] = []
        for message in self.messages[:MOST_MESSAGES]:
            if characters <= 0:
                break
            kept.append(Message(message.role, message.content[:characters]))
            characters -= len(message.content)
        return replace(self, messages=tuple(kept))


Document = str | Chat
"""What is read as one whole: a text, or a chat."""


def as_chat(prompt: Document) -> Chat:
    """A prompt as a chat: a plain one is the message of a user."""
    return prompt if isinstance(prompt, Chat) else Chat((Message("user", prompt),))


def shortened(document: Document, characters: int) -> Document:
    """The beginning of a document."""
    return document[:characters] if isinstance(document, str) else document.shortened(characters)


def is_blank(document: Document) -> bool:
    """Whether there is nothing in a document."""
    return document.is_blank if isinstance(document, Chat) else not document.strip()


class ChatError(Exception):
    """A record is no chat; `problems` holds the place of each problem in it, and what is wrong there."""

    def __init__(self, problems: Sequence[tuple[Place, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__(shown_problem(*self.problems[0]))


def shown_problem(place: Place, problem: str) -> str:
    """A problem with its place: `messages[1].role: is missing`."""
    return f"{address(place)}: {problem}"


def shown(value: object) -> str:
    """The repr of a value, shortened."""
    return _SHORT.repr(value)


def chat_keys(record: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """The keys that make a record a chat; None where it is none."""
    return next((keys for keys in CHAT_KEYS if all(key in record for key in keys)), None)


def read_chat(record: Mapping[Any, Any], place: str = "") -> Chat:
    """Read a record that has `chat_keys`.

    Args:
        record: `messages` of `role` and `content`; `conversations`, as ShareGPT has them, of `from` and `value`;
            `prompt` and `completion`, or `instruction`, `input` if there is one, and `output`, each a text (or, of the
            first two, messages).
        place: where the record stands, for messages.

    Raises:
        ChatError: lists every problem.
    """
    problems: list[tuple[Place, str]] = []
    messages = [_message(step, raw, problems) for step, raw in _turns(record, problems)]
    if problems:
        raise ChatError(problems)
    return Chat(tuple(message for message in messages if message), place)


def _turns(record: Mapping[Any, Any], problems: list[tuple[Place, str]]) -> Iterator[tuple[Place, Any]]:
    keys = chat_keys(record)
    if keys == ("instruction", "output"):
        parts = [(key, record.get(key)) for key in ("instruction", "input")]
        wrong = [key for key, part in parts if not isinstance(part, str) and not (key == "input" and part is None)]
        problems += [((key,), f"expected a text, found {shown(record.get(key))}") for key in wrong]
        asked = "\n\n".join(part for _, part in parts if isinstance(part, str) and part.strip())
        yield ("instruction",), {"role": "user", "content": asked}
        yield ("output",), {"role": "assistant", "content": record["output"]}
        return
    for key in keys or ():
        value = record[key]
        if isinstance(value, str) and key in {"prompt", "completion"}:
            yield (key,), {"role": "user" if key == "prompt" else "assistant", "content": value}
        elif not isinstance(value, list):
            expected = "a text or a list of messages" if key in {"prompt", "completion"} else "a list of messages"
            problems.append(((key,), f"expected {expected}, found {shown(value)}"))
        elif not value:
            problems.append(((key,), "holds no messages"))
        else:
            yield from (((key, number), raw) for number, raw in enumerate(value))


def _message(place: Place, raw: Any, problems: list[tuple[Place, str]]) -> Message | None:
    if not isinstance(raw, Mapping):
        problems.append((place, f"expected a message with role and content, found {shown(raw)}"))
        return None
    like_sharegpt = "role" not in raw and "from" in raw
    role_key, content_key = ("from", "value") if like_sharegpt else ("role", "content")
    role = raw.get(role_key)
    role = SHAREGPT_ROLES.get(role, role) if like_sharegpt and isinstance(role, str) else role
    if role not in ROLES:
        known = (*SHAREGPT_ROLES, *ROLES) if like_sharegpt else ROLES
        found = f", found {shown(role)}" if role_key in raw else ""
        problems.append(((*place, role_key), f"expected {', '.join(known[:-1])} or {known[-1]}{found}"))
    content = _content(raw.get(content_key))
    if content is None:
        found = f", found {shown(raw[content_key])}" if content_key in raw else ", which is missing"
        problems.append(((*place, content_key), f"expected a text{found}; leave out messages that hold anything else"))
    return Message(str(role), content or "")


def _content(value: Any) -> str | None:
    """A message's text, which may come in parts (`[{"type": "text", "text": "..."}]`); None where it is no text."""
    if isinstance(value, list) and value:
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value
        ]
        return None if any(not isinstance(part, str) for part in parts) else "".join(map(str, parts))
    return value if isinstance(value, str) else None
