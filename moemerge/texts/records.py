"""Records of data sets, of which each is one document: a text, or a chat in one of the forms that are in use."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from moemerge.chats import (
    CHAT_KEYS,
    MESSAGE_KEYS,
    RECORD_KEYS,
    Chat,
    ChatError,
    Document,
    chat_keys,
    read_chat,
    shown,
    shown_problem,
)
from moemerge.errors import RefusedError

_TEXT: Final = "text"
KEYS: Final = (_TEXT, *RECORD_KEYS)
"""Keys of a record that are read."""
# Contents may be parts, each with a type.
_KEPT_KEYS: Final = frozenset({*KEYS, *MESSAGE_KEYS, "type"})
_FORMS: Final = ", ".join(" and ".join(keys) for keys in ((_TEXT,), *CHAT_KEYS))
_MOST_SHOWN: Final = 12


def read_records(values: Iterable[tuple[str, Any]]) -> Iterator[Document]:
    """Read pairs of a place, for messages, and a record, which all have to be texts, or all chats.

    Raises:
        RefusedError: a record is neither, or not what the first one is; says where.
    """
    first: tuple[str, type] | None = None
    for place, value in values:
        document = _document(value, place)
        first = first or (place, type(document))
        if type(document) is not first[1]:
            kinds = ("a text", "a chat") if first[1] is Chat else ("a chat", "a text")
            raise RefusedError(f"{place}: is {kinds[0]}, and {first[0]} is {kinds[1]}. Put them into different files.")
        yield document


def is_record(keys: Iterable[object]) -> bool:
    """Whether what has these keys may be a document."""
    record = dict.fromkeys(keys)
    return _TEXT in record or chat_keys(record) is not None


def no_known_keys(place: str, keys: Iterable[object]) -> RefusedError:
    """The refusal of a record, or a table, in which nothing is known to be text."""
    names = [str(key) for key in keys]
    found = f"{', '.join(names[:_MOST_SHOWN])}{' ...' if names[_MOST_SHOWN:] else ''}" or "nothing"
    return RefusedError(f"{place}: expected a text, or an object with {_FORMS}; found {found}.")


def _document(value: Any, place: str) -> Document:
    if isinstance(value, str):
        return _whole_letters(value)
    if not isinstance(value, Mapping):
        raise RefusedError(f"{place}: expected a text, or an object with {_FORMS}; found {shown(value)}.")
    if chat_keys(value):
        try:
            return read_chat(_all_whole(value), place)
        except ChatError as error:
            raise RefusedError(f"{place}: {shown_problem(*error.problems[0])}.") from error
    if _TEXT not in value:
        raise no_known_keys(place, value)
    if not isinstance(value[_TEXT], str):
        raise RefusedError(f"{place}: {_TEXT}: expected a text, found {shown(value[_TEXT])}.")
    return _whole_letters(value[_TEXT])


def _whole_letters(text: str) -> str:
    """JSON can hold unpaired surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _all_whole(value: Any) -> Any:
    if isinstance(value, str):
        return _whole_letters(value)
    if isinstance(value, Mapping):
        return {key: _all_whole(held) for key, held in value.items() if key in _KEPT_KEYS}
    return [_all_whole(held) for held in value] if isinstance(value, list) else value
