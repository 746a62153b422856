"""Consoles, exit codes and JSON output that all commands share."""

import ctypes
import errno
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
from moemerge.cli.streams import say
from moemerge.errors import MoemergeError
from moemerge.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

_MOST_BYTES: Final = 3500
_M_MMAP_THRESHOLD: Final = -3
_SMALLEST_FREED: Final = 2**24


@contextmanager
def console_session(
    *, quiet: bool, verbose: int, debug: bool, cache_dir: Path | None = None, keeps_output: bool = False
) -> Iterator["Console"]:
    """Open a console for messages on standard error; an exception inside becomes a message and an exit code.

    Args:
        quiet: whether only warnings and errors are printed.
        verbose: 1 or more for moemerge's log.
        debug: whether tracebacks are shown, and what every library logs.
        cache_dir: the folder for Hub models, in place of HF_HUB_CACHE.
        keeps_output: whether there is an output, which an interrupt leaves as it was.
    """
    if cache_dir:
        os.environ["HF_HUB_CACHE"] = str(cache_dir)  # before huggingface_hub is imported
    # Other libraries' chatter belongs to those who look for a fault.
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "info" if debug else "error")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(name)s: %(message)s")
    console = _console(stderr=True)
    ours, handler = logging.getLogger("moemerge"), _ConsoleHandler(console)
    ours.addHandler(handler)
    ours.setLevel(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)
    ours.propagate = False
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # which programs in the background ignore
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield console
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        message, exit_code = explain_error(error, keeps_output=keeps_output)
        say(message, error=True)
        raise typer.Exit(exit_code) from error
    finally:
        ours.removeHandler(handler)


def _console(*, stderr: bool = False, width: int | None = None) -> "Console":
    """Make a console that escapes control characters, so that nothing printed can move the cursor."""
    from rich.console import Console

    class _Safe(Console):
        def render_str(self, text: str, **keys: Any) -> Any:
            return super().render_str(printable(text), **keys)

    # A terminal's lines end between words; those of a file are as long as what they say.
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return _Safe(stderr=stderr, soft_wrap=not terminal, highlight=False, markup=False, width=width)


class _ConsoleHandler(logging.Handler):
    """A handler that prints moemerge's own log records on a console."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning with the word `warning`, any other record with the name of its logger."""
        is_warning = record.levelno >= logging.WARNING
        text = f"{'warning' if is_warning else record.name}: {record.getMessage()}"
        self._console.print(text, style="yellow" if is_warning else None)


def _interrupt(_signal: int, _frame: object) -> None:
    interrupted.set()
    raise KeyboardInterrupt


def announcer(console: "Console", *, quiet: bool) -> Callable[[str], None]:
    """Make a function that prints a line on the console, or does nothing if `quiet`."""
    return (lambda _line: None) if quiet else console.print


def stoppable(report: Callable[..., None]) -> Callable[..., None]:
    """Wrap a progress callback so that it stops the work if an interrupt got lost, as may happen during an import.

    Raises:
        KeyboardInterrupt: an interrupt came before the call.
    """

    def report_or_stop(*arguments: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        report(*arguments)

    return report_or_stop


def return_freed_memory() -> None:
    """Have glibc give blocks from 16 MB on back when they are freed.

    By itself it learns to keep blocks of up to 32 MB for later; in a pass over the layers these scatter, and the heap
    grows by half of what it was (mallopt(3), M_MMAP_THRESHOLD).
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _SMALLEST_FREED)


def explain_error(error: BaseException, *, keeps_output: bool = False) -> tuple[str, int]:
    """Give the message for the user and the exit code for an exception that a command raised; see `console_session`."""
    # pydantic wraps one that it meets; an interrupt that is raised from another says more.
    if isinstance(error.__cause__, KeyboardInterrupt) and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    if isinstance(error, MoemergeError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        rest = str(error) or ("the output is as it was before" if keeps_output else "")
        return f"interrupted{': ' if rest else ''}{rest}", 130
    if limit := _limit_of_system(error):
        return f"error: {limit}", 1
    fault = "This is a fault in moemerge: please report it, with what --debug shows."
    return printable(f"error: {type(error).__name__}: {error}", _MOST_BYTES) + f"\n{fault}", 1


def _limit_of_system(error: BaseException) -> str | None:
    """Say what the system has no more of, if that is what an exception is about."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "memory ran out. `moemerge plan` says how much a merge needs."
    if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        return "too many files are open. Raise the limit, with `ulimit -n 1024`."
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system starts no more threads. Raise its limits, `ulimit -u` and `ulimit -v`."
    if isinstance(error, FileNotFoundError) and not _has_working_folder():
        return "the current folder is gone. Change into another one."
    return None


def _has_working_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def stdout() -> "Console":
    """Make a console for results on standard output."""
    # Tables are as wide as the terminal; in a file they need not be narrow.
    return _console(width=None if sys.stdout.isatty() else 160)


def end_dry_run(target: object, *, quiet: bool, json: bool) -> None:
    """Print the last line of a dry run, unless only results are to be printed."""
    if not (quiet or json):
        say(f"{target}: nothing was written, since this was a dry run.")


def print_json(value: Any) -> None:
    """Print a result as JSON, for programs."""
    import json

    say(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))  # the one control character that JSON leaves
