"""Make text of files, configs and names safe to print: no moved cursor, no colours, bounded length."""

import re
from typing import Final

# Control characters but tab and newline, those that turn the direction of writing, odd line ends, lone surrogates.
_UNSAFE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, most: int | None = None) -> str:
    r"""Write unsafe characters as escapes, such as `\x1b`, and leave out the middle of a text above `most` bytes."""
    if most is not None and len(text) > 2 * most:  # escapes make it longer, never shorter
        text = f"{text[:most]}{text[-most:]}"
    text = _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)
    encoded = text.encode()
    if most is None or len(encoded) <= most:
        return text
    kept = max(most - 40, 20) // 2
    return f"{encoded[:kept].decode(errors='ignore')} [... cut ...] {encoded[-kept:].decode(errors='ignore')}"
