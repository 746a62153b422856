"""Errors that typer's parser raises: click's classes, which newer releases of typer carry within themselves."""

from importlib import import_module
from typing import Any, Final

import typer

_PARSER: Final[Any] = import_module(typer.BadParameter.__module__)
UsageError: Final[Any] = _PARSER.UsageError
"""A command line that does not fit its command."""
NoArgsIsHelpError: Final[Any] = getattr(_PARSER, "NoArgsIsHelpError", ())
"""A command without arguments that needs some, whose message is its help page; before click 8.2 there is none."""
