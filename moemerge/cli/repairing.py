"""`moemerge repair`: put back what transformers 5 drops when it saves a merged model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.console import console_session, print_json, stdout
from moemerge.cli.options import Debug, Json, Quiet

if TYPE_CHECKING:
    from rich.console import Console

    from moemerge.checks.files import Difference


def repair_model(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The saved model's folder.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be put back; write nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put back what transformers 5 dropped when it saved a model again.

    That are keys of `config.json` that other readers need. They are put back in place; weights stay.

    Examples:
        moemerge repair out --dry-run
        moemerge repair out
    """
    with console_session(quiet=quiet, verbose=0, debug=debug, keeps_output=True):
        from dataclasses import asdict

        from moemerge.checks.repairing import repair

        found = repair(out, dry_run=dry_run)
        if json:
            print_json([asdict(difference) for difference in found])
        elif not quiet:
            print_repair(stdout(), out, found, dry_run=dry_run)


def print_repair(console: "Console", out: Path, found: "list[Difference]", *, dry_run: bool) -> None:
    """Print each value that was found, and the one that takes its place."""
    from moemerge.cli.tables import Table

    if not found:
        console.print(f"{out}: nothing to do: every reader finds its keys.")
        return
    table = Table("file and key", "found", "put back")
    for difference in found:
        table.add_row(difference.what, difference.found, difference.expected)
    console.print(table)
    console.print(f"{out}: {len(found)} to put back, nothing was written." if dry_run else f"{out}: repaired.")
