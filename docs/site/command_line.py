"""Write the page of all commands from the commands themselves: `python docs/site/command_line.py PAGE`."""

import sys
from html import escape
from pathlib import Path
from typing import Any

import typer

from moemerge.cli.app import command_line

HEAD = """\
# Command line

What `--help` says of each command. Exit codes are 0 for success, 1 for a failure, 2 if the config or the command has to
change, and 130 for an interruption.
"""


def commands() -> dict[str, Any]:
    """Commands as typer builds them, by the words that begin their command lines."""
    group: Any = typer.main.get_command(command_line())
    return {f"moemerge {name}": command for name, command in group.commands.items()}


def section(words: str, command: Any) -> str:
    """What a command is for, its usage, and a table of its arguments and options."""
    context = typer.Context(command, info_name=words)
    usage = " ".join([words, *(piece.strip("{}") for piece in command.collect_usage_pieces(context))])
    rows = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    table = [f"| `{name}` | {escape(text, quote=False).replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(
        [
            f"## {words}",
            "",
            _described(command.help),
            "",
            f"    {usage}",
            "",
            "| option | meaning |",
            "|---|---|",
            *table,
            "",
        ]
    )


def _described(help_text: str) -> str:
    """A command's help as Markdown: its examples are a block."""
    return help_text.replace("\nExamples:\n", "\nExamples:\n\n")


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([HEAD, *(section(words, command) for words, command in commands().items())])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
