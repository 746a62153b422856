"""`moemerge families`: the table of output families, as text, JSON or Markdown."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from moemerge.cli.console import console_session, print_json, stdout
from moemerge.cli.options import Debug, Json
from moemerge.cli.streams import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moemerge.families.overview import FamilyRow

_HEADINGS: Final = ("family", "dense models", "they may have", "shared experts", "dense layers", "router")


def list_families(
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    debug: Debug = False,
) -> None:
    """List the output families, with the dense models that each repeats exactly and what it can hold."""
    with console_session(quiet=False, verbose=0, debug=debug):
        from dataclasses import asdict

        from moemerge.families.overview import family_rows

        rows = family_rows()
        if json:
            print_json([asdict(row) for row in rows])
        elif markdown:
            say(as_markdown(rows))
        else:
            print_families(stdout(), rows)


def as_markdown(rows: "list[FamilyRow]") -> str:
    """Format the tables of families and of engines, and the notes below them, for docs/families.md."""
    table = [_HEADINGS, tuple("---" for _ in _HEADINGS), *(_cells(row, code="`") for row in rows)]
    versions = dict.fromkeys(f"{cell.engine} ({cell.version})" for row in rows for cell in row.engines)
    engines = [("family", *versions), tuple("---" for _ in range(len(versions) + 1))]
    engines += [(f"`{row.family}`", *(cell.short for cell in row.engines)) for row in rows]
    notes = [f"- `{row.family}`: {note}" for row in rows for note in row.notes]
    return "\n".join([*map(_line, table), "", *map(_line, engines), "", *notes])


def _line(cells: "Sequence[str]") -> str:
    return f"| {' | '.join(cells)} |"


def print_families(console: "Console", rows: "list[FamilyRow]") -> None:
    """Print one paragraph for each family."""
    for row in rows:
        console.print(row.family, style="bold")
        for heading, cell in zip(_HEADINGS[1:], _cells(row)[1:], strict=True):
            console.print(f"  {heading}: {cell}")
        for engine in row.engines:
            console.print(f"  {engine.engine} ({engine.version}): {engine.details}", markup=False)
        for note in row.notes:
            console.print(f"  note: {note}")


def _cells(row: "FamilyRow", code: str = "") -> tuple[str, ...]:
    takes = ", ".join(f"{code}{model_type}{code}" for model_type in row.takes)
    holds = ", ".join(row.holds) or "nothing more"
    return (f"{code}{row.family}{code}", takes, holds, row.shared, row.dense_layers, row.scoring)
