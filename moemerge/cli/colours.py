"""The legend that names experts in their colours."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from moemerge.evaluation.routes.palette import style_of
from moemerge.printable import printable


def has_colours(console: Console) -> bool:
    """Whether a console shows colours; not in a pipe or file, nor under NO_COLOR."""
    return bool(console.color_system) and not console.no_color


def legend(names: Iterable[str], shares: Iterable[float]) -> list[Text]:
    """Name each expert in its colour, with its share of tokens, from 0 to 1."""
    return [
        Text(printable(f"{name} {share:.1%}"), style_of(expert))
        for expert, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
