"""Read JSON from untrusted sources in bounded time and memory: headers, indexes, configs."""

import json
from collections.abc import Callable
from typing import Any, Final

# A little more than the header of a file with 100 000 tensors has. In memory values are many times their text.
MOST_BYTES: Final = 16_000_000
_MOST: Final = {b'"': 1_500_000, b"[": 300_000, b"{": 300_000, b",": 1_200_000}
# Fewer digits than the largest float has.
_MOST_DIGITS: Final = 300


class JsonTextError(Exception):
    """The text is not JSON, or holds more than moemerge reads; says why in one line."""


def parse_json(text: bytes, repeated: Callable[[str], None] = lambda _: None) -> Any:
    """Parse a JSON text in UTF-8.

    Args:
        text: the bytes of the text.
        repeated: called with each key that an object has twice (the last one counts); may raise.

    Raises:
        JsonTextError: the text is not JSON, or there is too much of it.
    """
    if len(text) > MOST_BYTES:
        raise JsonTextError(f"has {len(text)} bytes; at most {MOST_BYTES} are read")
    if any(text.count(sign) > most for sign, most in _MOST.items()):
        raise JsonTextError("holds more values than any model has")

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    repeated(key)
                seen.add(key)
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=table, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise JsonTextError(f"is not valid JSON: {error!s:.200}") from error


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; at most {_MOST_DIGITS} are read")
    return int(digits)
