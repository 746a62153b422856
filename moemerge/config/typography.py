"""Characters that web pages and word processors put in place of spaces and straight quotes."""

import re
import unicodedata
from typing import Final

import yaml

from moemerge.config.problems import parts_of
from moemerge.places import Place

_ODD: Final = "[\u00a0\u1680\u2000-\u200f\u202f\u205f\u2060\u3000\ufeff]"
# Where YAML itself expects a space: in an indentation, after a dash, after a key's colon.
_ODD_SPACE: Final = re.compile(rf"\s*(?:- +)*(?:-|[\w-]+:)? *?({_ODD})", re.ASCII)
# Quotes within are those of the text; an apostrophe is no end, and no beginning either.
_CURLY: Final = re.compile(
    "[\u201c\u201d][^\u201c\u201d]*[\u201c\u201d]?"
    "|\u201e[^\u201c-\u201e]*[\u201c\u201d]?"
    "|\u2018[^\u2018]*\u2019"
    "|\u201a[^\u2018\u201a]*[\u2018\u2019]"
)


def odd_space(line: str) -> tuple[int, str] | None:
    """Find a character that only looks like a space, where YAML expects one: its column, and what is wrong."""
    if (match := _ODD_SPACE.match(line)) is None:
        return None
    sign = match[1]
    return match.start(1), (
        f"U+{ord(sign):04X} ({unicodedata.name(sign).lower()}) stands where YAML expects a space. Write a space in its "
        "place"
    )


def odd_keys(root: yaml.Node | None) -> list[tuple[Place, str]]:
    """Find keys that begin with a character that only looks like a space, or with a dash and one."""
    found = {}
    for place, part in parts_of(root):
        for key, _ in part.value if isinstance(part, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and not key.style and (odd := odd_space(key.value)):
                found[(*place, key.value)] = odd[1]
    return [*found.items()]


def in_curly_quotes(text: str) -> bool:
    """Whether a text stands in curly quotes, which are not quotes of something within it."""
    return _CURLY.fullmatch(text) is not None


def curly_quotes(root: yaml.Node | None) -> list[tuple[Place, str]]:
    """Find values that stand in curly quotes alone, which YAML takes for part of the text.

    A text with such quotes within it is none, and neither is one that stands in straight quotes.
    """
    return [
        (
            place,
            f"stands in curly quotes ({part.value[0]}), which YAML takes for part of the text. Write straight quotes "
            "in their place, or around them if they belong to the text",
        )
        for place, part in parts_of(root)
        if isinstance(part, yaml.ScalarNode) and not part.style and in_curly_quotes(part.value)
    ]
