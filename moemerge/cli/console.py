"""What all commands say in the same way: messages and exit codes, tables on stdout, JSON."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from moemerge.checkpoint.files import interrupted
from moemerge.errors import MoemergeError

if TYPE_CHECKING:
    from rich.console import Console

_M_MMAP_THRESHOLD: Final = -3


@contextmanager
def speaking(*, quiet: bool, verbose: int, debug: bool, cache_dir: Path | None = None) -> Iterator["Console"]:
    """A console for messages; turns what goes wrong inside into a message and an exit code."""
    from rich.console import Console

    if cache_dir:
        os.environ["HF_HUB_CACHE"] = str(cache_dir)  # before huggingface_hub is imported
    # Other libraries' chatter and bars belong to those who ask for more.
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "info" if verbose or debug else "error")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.ERROR
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # ignored by programs in the background
        signal.signal(signal.SIGINT, _interrupt)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        yield console
    except (typer.Exit, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        message, exit_code = explain_error(error)
        typer.echo(message, err=True)
        raise typer.Exit(exit_code) from error


def _interrupt(_signal: int, _frame: object) -> None:
    interrupted.set()
    raise KeyboardInterrupt


def saying(console: "Console", *, quiet: bool) -> Callable[[str], None]:
    """What prints a line of news, or nothing."""
    return (lambda _line: None) if quiet else console.print


def stoppable(report: Callable[..., None]) -> Callable[..., None]:
    """The same report, which stops the work if an interrupt got lost, as one may that comes during an import."""

    def report_or_stop(*arguments: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        report(*arguments)

    return report_or_stop


def return_freed_memory() -> None:
    """Have glibc give large blocks back when they are freed.

    By itself it learns to keep blocks of up to 32 MB for later; in a pass over the layers these scatter, and the heap
    grows by half of what it was (mallopt(3), M_MMAP_THRESHOLD).
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**24)


def explain_error(error: BaseException) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, MoemergeError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {str(error) or 'the output is as it was before'}", 130
    if isinstance(error, MemoryError):
        return "error: memory ran out. `moemerge plan` says how much a merge needs.", 1
    fault = "This is a fault in moemerge: please report it, with what --debug shows."
    return f"error: {type(error).__name__}: {error}\n{fault}", 1


def stdout() -> "Console":
    """A console for results."""
    from rich.console import Console

    # Tables are as wide as the terminal; in a file they need not be narrow.
    width = None if sys.stdout.isatty() else 160
    return Console(soft_wrap=True, highlight=False, markup=False, width=width)


def print_json(value: Any) -> None:
    """A result for programs."""
    import json

    typer.echo(json.dumps(value, indent=2))
