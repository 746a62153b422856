"""Tables whose words and numbers are never broken over lines; one that is too wide is continued below itself."""

from collections.abc import Iterator
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from moemerge.printable import printable

_GAP: Final = 2


class Table:
    """Rows of texts in aligned columns; columns that do not fit beside the first are repeated below with it."""

    def __init__(self, *headings: str) -> None:
        self._rows = [tuple(map(printable, headings))]

    def add_row(self, *cells: str) -> None:
        """Add a row with a text for each heading."""
        self._rows.append(tuple(map(printable, cells)))

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Give the table's lines, as wide as the console."""
        widths = [max(map(cell_len, column)) for column in zip(*self._rows, strict=True)]
        for number, columns in enumerate(_groups(widths, options.max_width)):
            if number:
                yield Text("")
            for row in self._rows:
                cells = [row[column] + " " * (widths[column] - cell_len(row[column])) for column in columns]
                yield Text((" " * _GAP).join(cells).rstrip(), no_wrap=True, overflow="ignore")


def _groups(widths: list[int], most: int) -> Iterator[list[int]]:
    """Divide columns into groups that fit into a width, each with the first column in front."""
    group, used = [0], widths[0]
    for column, width in enumerate(widths[1:], 1):
        if len(group) > 1 and used + _GAP + width > most:
            yield group
            group, used = [0], widths[0]
        group.append(column)
        used += _GAP + width
    yield group
