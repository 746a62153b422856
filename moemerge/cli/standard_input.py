"""Standard input in place of a file, where a command line says `-`."""

import atexit
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Final

from moemerge.errors import RefusedError

STANDARD_INPUT: Final = "-"
"""What stands for standard input on a command line."""


def is_terminal() -> bool:
    """Whether somebody types on standard input, which may also be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_standard_input() -> str:
    """Read all of standard input, as UTF-8; where it is closed, there is nothing to read.

    Raises:
        RefusedError: it is other bytes.
    """
    return decoded(sys.stdin.buffer.read() if sys.stdin is not None else b"")


def decoded(text: bytes) -> str:
    """Decode what standard input gave.

    Raises:
        RefusedError: it is not UTF-8.
    """
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError("standard input: is not text in UTF-8.") from error


def path_of(given: str) -> str:
    """A path of the command line; for `-`, that of a file with standard input, which is gone when the process ends.

    Raises:
        RefusedError: standard input is no text in UTF-8, or holds none.
    """
    return str(_copied_input()) if given == STANDARD_INPUT else given


@lru_cache(1)
def _copied_input() -> Path:
    """Read standard input into a file, once: JSON lines if it begins with a brace, else text."""
    text = read_standard_input()
    if not text.strip():
        raise RefusedError("standard input: holds no text.")
    folder = tempfile.TemporaryDirectory(prefix="moemerge-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / f"standard-input{'.jsonl' if text.lstrip().startswith('{') else '.txt'}"
    path.write_text(text, encoding="utf-8")
    return path
