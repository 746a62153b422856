"""Standard output and error that may be closed, full, or of a small alphabet: they lose text, never the work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from moemerge.printable import printable


class Guarded:
    """A text stream that keeps its first failure instead of raising it; what is written afterwards goes nowhere."""

    def __init__(self, stream: Any) -> None:
        """Guard `stream`, which is None if it was closed before the program began."""
        self.failure: OSError | ValueError | None = None if stream else ValueError("it is closed")
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  as long as the program
        with suppress(AttributeError, ValueError, OSError):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, if nothing has failed yet."""
        if self.failure is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush, if nothing has failed yet."""
        if self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: OSError | ValueError) -> None:
        self.failure = error
        # What lies in buffers must not fail again when the program ends.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    @property
    def why(self) -> str:
        """The failure in words."""
        return getattr(self.failure, "strerror", None) or str(self.failure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _keep_open(number: int) -> None:
    """Open the null device under a closed standard stream's number, or the next file to be opened would get it."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)


@contextmanager
def guarded_streams() -> Iterator[tuple[Guarded, Guarded]]:
    """Replace standard output and error by guards; they stay in place if one of them failed."""
    for number in range(3):
        _keep_open(number)
    given = sys.stdout, sys.stderr
    out, err = guards = Guarded(sys.stdout), Guarded(sys.stderr)
    sys.stdout, sys.stderr = guards
    try:
        yield guards
    finally:
        out.flush()
        err.flush()
        if not (out.failure or err.failure):
            sys.stdout, sys.stderr = given


def say(text: str, *, error: bool = False) -> None:
    """Print a line that may hold anybody's names."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)
