"""Anybody's text in a Markdown page: it stays text, whatever it holds."""

import re
from typing import Final

from moemerge.printable import printable

# What begins emphasis, code, links, HTML, entities, cells of a table, strikethrough or formulas.
_SPECIAL: Final = re.compile(r"[\\`*_\[\]<>&|~$#]")
_ENTITIES: Final = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def as_text(text: str) -> str:
    """One line of plain text, also in a table's cell or a heading."""
    line = " ".join(printable(text).split())
    return _SPECIAL.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line)


def as_code(text: str) -> str:
    """One line between backticks, in which nothing else has a meaning, also in a table's cell."""
    line = " ".join(printable(text).split()).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"
