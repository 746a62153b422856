"""Escape untrusted text for a Markdown page, so that it stays text."""

import re
from typing import Final

from moemerge.printable import printable

# Characters that begin emphasis, code, links, HTML, entities, table cells, strikethrough or formulas.
_SPECIAL: Final = re.compile(r"[\\`*_\[\]<>&|~$#]")
_ENTITIES: Final = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def as_text(text: str) -> str:
    """Escape one line as plain text, also for a table's cell or a heading."""
    line = " ".join(printable(text).split())
    return _SPECIAL.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line)


def as_code(text: str) -> str:
    """Put one line between backticks, in which nothing else has a meaning, also for a table's cell."""
    line = " ".join(printable(text).split()).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"
