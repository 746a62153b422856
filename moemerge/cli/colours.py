"""A colour for each expert, and the legend that names them."""

from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.text import Text

from moemerge.printable import printable

_COLOURS: Final = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow")


def has_colours(console: Console) -> bool:
    """Whether a console shows colours; not in a pipe or file, nor under NO_COLOR."""
    return bool(console.color_system) and not console.no_color


def style_of(expert: int) -> str:
    """The style of an expert's tokens; there are 16."""
    return f"{_COLOURS[expert % len(_COLOURS)]}{' underline' if expert >= len(_COLOURS) else ''}"


def legend(names: Iterable[str], shares: Iterable[float]) -> list[Text]:
    """Name each expert in its colour, with its share of tokens, from 0 to 1."""
    return [
        Text(printable(f"{name} {share:.1%}"), style_of(expert))
        for expert, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
