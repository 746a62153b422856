"""Help pages in plain text: commands and options in groups, examples at the end, and no word broken over two lines."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

_WIDEST_NAME: Final = 26
_EXAMPLES: Final = "\n\nExamples:\n"
MERGE: Final = "merge"
"""The command that a command line without a command's name means."""


class Command(TyperCommand):
    """A command whose options are listed by `rich_help_panel`, and whose docstring may end in a section of examples."""

    def format_help_text(self, _ctx: Any, formatter: Any) -> None:
        """Write the docstring without its examples."""
        _write_paragraphs(formatter, (self.help or "").partition(_EXAMPLES)[0])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then a section for each group of options, in the order in which they are declared."""
        _write_options(formatter, ctx, self.get_params(ctx))

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """Write the docstring's examples, line by line as they are."""
        if examples := (self.help or "").partition(_EXAMPLES)[2]:
            lines = textwrap.indent(textwrap.dedent(examples).strip(), "  ")
            formatter.write(f"\nExamples:\n{lines}\n")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name the arguments without braces."""
        return [re.sub(r"[{}]", "", piece).replace("......", "...") for piece in super().collect_usage_pieces(ctx)]

    def get_short_help_str(self, limit: int = 0) -> str:  # noqa: ARG002  the interface's; whole lines are wrapped here
        """Give the docstring's first line."""
        return (self.help or "").partition("\n")[0]


class Commands(TyperGroup):
    """All commands; a command line that names none of them is a merge."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `merge` in front of arguments that begin with no command's name and no option of this group."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own:
            args = [MERGE, *args]
        return super().parse_args(ctx, args)

    def format_help_text(self, _ctx: Any, formatter: Any) -> None:
        """Write the text of the group."""
        _write_paragraphs(formatter, self.help or "")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with the first line of each one's docstring, then the options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            section = str(getattr(command, "rich_help_panel", None) or "Commands")
            sections.setdefault(section, []).append((name, command.get_short_help_str()))
        for section, rows in sections.items():
            _write_rows(formatter, section, rows)
        _write_options(formatter, ctx, self.get_params(ctx))

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """Write the epilog."""
        _write_paragraphs(formatter, self.epilog or "")

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete commands, options, and the configs of the folder, since a merge needs no command's name."""
        found = super().shell_complete(ctx, incomplete)
        configs = sorted(path.name for path in Path().glob(f"{_literal(incomplete)}*.y*ml"))
        make = type(found[0]) if found else None
        return found if make is None else [*found, *(make(name) for name in configs)]


def _literal(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _write_options(formatter: Any, ctx: Any, parameters: Iterable[Any]) -> None:
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        record = parameter.get_help_record(ctx)
        if record is not None:
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            section = str(getattr(parameter, "rich_help_panel", None) or default)
            if parameter.name == "help":
                section = next(reversed(sections), section)
            name, text = re.sub(r" <[^>]*>$", "", record[0]), record[1]
            sections.setdefault(section, []).append(
                (name, re.sub(r"; x>=\d+\]", "]", re.sub(r"\[default: \((.*)\)\]", r"[default: \1]", text)))
            )
    for section, rows in sections.items():
        _write_rows(formatter, section, rows)


def _write_paragraphs(formatter: Any, text: str) -> None:
    """Write paragraphs, each wrapped; lines that are indented stay as they are."""
    for paragraph in filter(None, text.split("\n\n")):
        lines = paragraph.splitlines()
        whole = all(line.startswith("  ") for line in lines)
        shown = paragraph if whole else _wrapped(paragraph, formatter.width, "  ", "  ")
        formatter.write(f"\n{shown}\n")


def _write_rows(formatter: Any, heading: str, rows: Sequence[tuple[str, str]]) -> None:
    """Write names with their texts in two columns; a long name has a line of its own."""
    column = 4 + min(max(len(name) for name, _ in rows), _WIDEST_NAME)
    formatter.write(f"\n{heading}:\n")
    for name, text in rows:
        first = f"  {name:<{column - 2}}"
        if len(first) > column:
            formatter.write(f"  {name}\n")
            first = " " * column
        formatter.write(f"{_wrapped(text, formatter.width, first, ' ' * column)}\n")


def _wrapped(text: str, width: int, first: str, rest: str) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    ).rstrip()
