"""Explain in plain words what is wrong with the syntax of YAML, and point at it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import yaml

from moemerge.config.typography import odd_space

_MOST_SCANNED: Final = 120_000
_WIDEST: Final = 70
_KEY: Final = re.compile(r"(\s*(?:- +)*)([A-Za-z_][\w-]*)")
_NEEDS_QUOTES: Final = "*&!@`%"
_INDENTATION: Final = (
    "its indentation fits none of the lines above: items of one list, and keys of one expert, begin at the same column"
)

# What stands around YAML in a notebook, a chat or a README, and is copied with it.
_AROUND: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"\s*(```|~~~)"), "is Markdown. Delete the lines that begin with {}"),
    (
        re.compile(r"\s*(?:\w+\s*=\s*)?[rRfF]?(\"{3}|'{3})"),
        "is Python. Keep only the YAML between the quotes {}",
    ),
    (re.compile(r"\s*(%%\w+)"), "is a command of a notebook, {}. Delete this line"),
)


@dataclass(frozen=True)
class Spot:
    """A place in a text, counted from 0, and what is wrong there."""

    line: int
    column: int
    problem: str


@dataclass(frozen=True)
class _Broken:
    """A text that is not YAML, and where the parser stopped."""

    lines: list[str]
    text: str
    line: int
    column: int
    context: str
    problem: str
    context_line: int
    context_column: int

    def at(self, line: int, column: int) -> str:
        """The character at a place; empty at the end of a line."""
        return self.lines[line][column : column + 1] if line < len(self.lines) else ""

    def indentation(self, line: int) -> int:
        """The number of spaces and tabs that a line begins with."""
        return len(self.lines[line]) - len(self.lines[line].lstrip()) if line < len(self.lines) else 0

    @cached_property
    def last_quoted(self) -> yaml.ScalarToken | None:
        """The token before the place where the parser stopped, if it is a quoted text."""
        last = None
        try:
            for token in yaml.scan(self.text[:_MOST_SCANNED], Loader=yaml.SafeLoader):
                mark = token.start_mark
                if (mark.line, mark.column) >= (self.line, self.column):
                    break
                if isinstance(token, yaml.ScalarToken):
                    last = token
        except yaml.YAMLError:
            pass
        return last if last is not None and last.style in {"'", '"'} else None


def explain_syntax(text: str, error: yaml.YAMLError) -> str:
    """Explain an error of the YAML parser: the line, plain words, and the line itself with a caret below it."""
    lines = text.split("\n")
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        position = getattr(error, "position", None)
        if not isinstance(position, int):
            return " ".join(str(error).split())[:400]
        before = text[:position]
        spot = Spot(
            before.count("\n"),
            position - before.rfind("\n") - 1,
            f"holds {ascii(text[position : position + 1])[1:-1]}, a control character. Remove it",
        )
        return _shown(lines, spot)
    context = getattr(error, "context_mark", None) or mark
    broken = _Broken(
        lines,
        text,
        mark.line,
        mark.column,
        str(getattr(error, "context", None) or ""),
        str(getattr(error, "problem", None) or error),
        context.line,
        context.column,
    )
    for explain in _EXPLANATIONS:
        if found := explain(broken):
            return _shown(lines, found)
    return _shown(lines, Spot(mark.line, mark.column, broken.problem))


def _shown(lines: list[str], spot: Spot) -> str:
    line = lines[spot.line].rstrip("\r") if spot.line < len(lines) else ""
    first = max(0, min(spot.column - _WIDEST // 2, len(line) - _WIDEST))
    shown = line[first : first + _WIDEST].replace("\t", " ")
    number = str(spot.line + 1)
    caret = " " * (spot.column - first) + "^"
    return f"line {number}: {spot.problem}.\n      {number} | {shown}\n      {' ' * len(number)} | {caret}"


def _copied(broken: _Broken) -> Spot | None:
    """Find what was copied with the YAML; an indented line may be one of a prompt, unless the parser stopped at it."""
    stopped = {broken.line, broken.context_line}
    for number, line in enumerate(broken.lines[: max(stopped) + 1]):
        for around, problem in _AROUND if number in stopped or line.lstrip() == line else ():
            if match := around.match(line):
                return Spot(number, match.start(1), problem.format(match[1]))
    return None


def _odd_space(broken: _Broken) -> Spot | None:
    for number in _near(broken, broken.line):
        if found := odd_space(broken.lines[number]):
            return Spot(number, *found)
    return None


def _near(broken: _Broken, *lines: int) -> list[int]:
    """Lines where a mistake may be: the one that a construct began in, the one above the stop, and the given ones."""
    above = [number for number in range(broken.line) if broken.lines[number].strip()][-1:]
    return [n for n in dict.fromkeys([broken.context_line, *above, *lines]) if n < len(broken.lines)]


def _tab(broken: _Broken) -> Spot | None:
    if broken.line < len(broken.lines):
        indentation = broken.lines[broken.line][: broken.indentation(broken.line)]
        if "\t" in indentation:
            return Spot(broken.line, indentation.index("\t"), "is indented with a tab. Write spaces in its place")
    return None


def _key(broken: _Broken) -> Spot | None:
    """Find what a key lacks before its value, in the line that the parser complains about or in the one above."""
    if "mapping values" not in broken.problem and "expected ':'" not in broken.problem:
        return None
    for number in _near(broken):
        line = broken.lines[number]
        match = _KEY.match(line)
        if match is None:
            continue
        key, end, rest = match[2], match.end(), line[match.end() :]
        if re.match(r":[^\s/]", rest):
            return Spot(number, end + 1, f"a space is missing after the colon: write `{key}: ...`")
        if re.match(r"\s*[=\uff1a]", rest):
            column = end + len(rest) - len(rest.lstrip())
            return Spot(number, column, f"a key ends in a colon and a space: write `{key}: ...`")
        if not rest.lstrip().startswith(":"):
            return Spot(number, end, f"a colon is missing after {key}: write `{key}: ...`")
    return None


def _colon(broken: _Broken) -> Spot | None:
    """Tell a colon within a text from a key that is indented too far."""
    if "mapping values" not in broken.problem:
        return None
    if re.search(r":\s", broken.lines[broken.line][: broken.column]):
        return Spot(broken.line, broken.column, "a text with a colon and a space in it has to stand in quotes")
    above = next((n for n in range(broken.line - 1, -1, -1) if broken.lines[n].strip()), broken.line)
    if re.match(r"\s*-[A-Za-z]", broken.lines[above]):
        return Spot(above, broken.indentation(above) + 1, "a space is missing after the dash")
    return Spot(broken.line, broken.indentation(broken.line), _INDENTATION)


def _quote(broken: _Broken) -> Spot | None:  # noqa: PLR0911  one for each kind
    """Find a quote that is not closed, or closed too early."""
    if "scalar" in broken.context and "end of stream" in broken.problem:
        return Spot(broken.context_line, broken.context_column, "the quote that opens here is not closed")
    if "escape" in broken.problem:
        problem = "in double quotes, a backslash begins an escape: write two, or single quotes in place of double ones"
        line = broken.lines[broken.line]
        return Spot(broken.line, max(line.rfind("\\", 0, broken.column + 1), 0), problem)
    token = broken.last_quoted
    if token is None or "expected" not in broken.problem:
        return None
    if token.start_mark.line < token.end_mark.line:
        return Spot(
            token.start_mark.line, token.start_mark.column, "the quote that opens here is not closed in its line"
        )
    follows = broken.at(broken.line, broken.column)
    if (
        token.end_mark.line == broken.line
        and follows not in {*"]},:"}
        and broken.indentation(broken.line) < broken.column
    ):
        if "flow" in broken.context and follows in {"'", '"'}:
            return None  # a missing comma
        hint = "; an apostrophe within single quotes is written twice" if token.style == "'" else ""
        return Spot(broken.line, broken.column, f"text goes on after the quote that ends it{hint}")
    return None


def _bracket(broken: _Broken) -> Spot | None:  # noqa: PLR0911  one for each kind
    found = broken.at(broken.line, broken.column)
    if "flow" not in broken.context:
        if found and found in "]}" and "expected" in broken.problem:
            return Spot(broken.line, broken.column, f"{found} closes nothing: there is no bracket that it belongs to")
        if found == "," and "expected" in broken.problem:
            return Spot(broken.line, broken.column, "a comma separates values within brackets only. Remove it")
        return None
    opened = broken.at(broken.context_line, broken.context_column)
    if "flow node" in broken.context:
        return Spot(broken.line, broken.column, "a value is missing before this, or a comma is one too many")
    line = broken.lines[broken.context_line]
    comment = re.search(r"\s#", line[broken.context_column :])
    if broken.line > broken.context_line and comment:
        column = broken.context_column + comment.start() + 1
        return Spot(broken.context_line, column, "# begins a comment here. Put a text that holds it in quotes")
    deeper = broken.indentation(broken.line) > broken.indentation(broken.context_line)
    if broken.line == broken.context_line and found and found in "]}":
        return Spot(broken.line, broken.column, f"{opened} is closed by {found}")
    if broken.line == broken.context_line or (deeper and found not in {"", "-", ":"}):
        return Spot(broken.line, broken.column, "a comma is missing before this")
    return Spot(broken.context_line, broken.context_column, f"the {opened} that opens here is not closed")


def _special(broken: _Broken) -> Spot | None:
    for line, column in ((broken.context_line, broken.context_column), (broken.line, broken.column)):
        sign = broken.at(line, column)
        if sign and sign in _NEEDS_QUOTES:
            return Spot(line, column, f"a text that begins with {sign} has to stand in quotes")
    return None


def _rest(broken: _Broken) -> Spot | None:
    if "another document" in broken.problem:
        return Spot(broken.line, broken.column, "a second document begins here, and a config is one. Remove this line")
    if "block scalar" in broken.context:
        return Spot(broken.line, broken.column, "the text of a block begins in the line after | or >")
    if "block" in broken.context or "document start" in broken.problem:
        return Spot(broken.line, broken.column, _INDENTATION)
    return None


_EXPLANATIONS: Final[tuple[Callable[[Any], Spot | None], ...]] = (
    _copied, _odd_space, _tab, _special, _key, _colon, _quote, _bracket, _rest,
)  # fmt: skip
