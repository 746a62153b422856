"""Files on other machines, read by byte ranges; ranges that are read again are kept on the disk.

A range is one stretch of bytes. Reading that was interrupted continues where it stopped, and a machine that is too busy
is asked again.
"""

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from moemerge.checkpoint.copy import write_all, write_failure
from moemerge.checkpoint.files import Reader
from moemerge.errors import SourceError
from moemerge.sources.retries import Patience, sleep

if TYPE_CHECKING:
    from typing_extensions import Self

_log: Final = logging.getLogger(__name__)
_KEPT_BYTES: Final = 2**20
# Seconds between checks whether the reader still waits.
_NAP_SECONDS: Final = 0.25


class RangedFile(ABC):
    """A file on another machine; a `moemerge.checkpoint.files.RemoteFile`."""

    nbytes: int
    identity: str

    def __init__(self, name: str, kept_name: str, announce: Callable[[str], None]) -> None:
        """Describe a file.

        Args:
            name: the file's name, without its folder.
            kept_name: the name of a file that holds its kept bytes; no file of other content has the same.
            announce: called with a line about each long wait.
        """
        self.name, self._kept_name, self.announce = name, kept_name, announce
        self._spool: _Spool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Give what another process reads the file by: without the bytes that are kept here."""
        return {**self.__dict__, "_spool": None, "announce": _log.info}

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Keep these bytes in `folder` when they are first read."""
        if self._spool is None or self._spool.path.parent != folder:
            self._spool = _Spool(folder / self._kept_name)
        self._spool.want(start, start + nbytes)

    def open(self, start: int, nbytes: int) -> Reader:
        """Open the file for reading `nbytes` bytes from offset `start` on; kept bytes come from a file on the disk.

        Raises:
            OutputError: the disk is full.
            SourceError: the bytes cannot be reached, or the file was changed; reading may raise it too.
        """
        if nbytes and self._spool and self._spool.wants(start, start + nbytes):
            return self._spool.open(self, start, start + nbytes)
        return self.range(start, start + nbytes)

    def patience(self) -> Patience:
        """How often reading of a range is tried again."""
        return Patience(self, self.announce)

    @abstractmethod
    def range(self, start: int, end: int) -> "RangeReader":
        """A reader of the bytes from `start` up to `end`, which come from the other machine."""

    @abstractmethod
    def explain(self, error: Exception) -> SourceError:
        """The error for reading that failed for good."""


class RangeReader(ABC):
    """A reader of a range of a file, as the bytes arrive."""

    def __init__(self, file: RangedFile, start: int, end: int) -> None:
        """Read nothing yet; the range goes from `start` up to `end`."""
        self._reads, self._next, self._end = file, start, end
        self._patience = file.patience()
        self._open = ExitStack()
        self._chunks: Iterator[bytes] | None = None
        self._left = memoryview(b"")
        self._again_at = 0.0

    @abstractmethod
    def _connect(self) -> Iterator[bytes]:
        """Ask for the bytes from `_next` up to `_end`; they may come in chunks of any size."""

    def readinto(self, view: memoryview, /) -> int | None:
        """Read what has arrived; None while the next try waits."""
        if not self._left and self._next < self._end and not self._receive():
            return None
        count = min(len(view), len(self._left))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _receive(self) -> bool:
        """Wait for a chunk; False if none has arrived."""
        wait = self._again_at - time.monotonic()
        sleep(min(max(wait, 0), _NAP_SECONDS))
        if wait > 0:
            return False
        try:
            if self._chunks is None:
                self._chunks = self._connect()
            chunk = next(self._chunks, b"")
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001  of several libraries, which have nothing in common
            return self._try_later(error)
        if not chunk:
            return self._try_later(ConnectionError(f"the answer ended {self._end - self._next} bytes too early"))
        self._patience.reset()
        self._left = memoryview(chunk)[: self._end - self._next]
        self._next += len(self._left)
        if self._next == self._end:
            with suppress(Exception):  # a connection is used again only when its answer was read to the end
                next(self._chunks, b"")
        return True

    def _try_later(self, error: Exception) -> Literal[False]:
        self._chunks = None
        self._open.close()
        try:
            self._again_at = time.monotonic() + self._patience.wait_after(error)
        except Exception as final:
            raise self._reads.explain(final) from final
        return False

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


class _Spool:
    """Bytes read of a file, kept in a sparse local file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spans: dict[tuple[int, int], threading.Lock] = {}
        self._held: set[tuple[int, int]] = set()

    def want(self, start: int, end: int) -> None:
        """Mark these bytes to be kept; they are fetched together, whichever of them is read first."""
        if not any(first <= start and end <= last for first, last in self._spans):
            spans = {span: lock for span, lock in self._spans.items() if not start <= span[0] <= span[1] <= end}
            self._spans = spans | {(start, end): threading.Lock()}

    def wants(self, start: int, end: int) -> bool:
        """Whether all of these bytes are marked to be kept."""
        for first, last in sorted(self._spans):
            if first <= start < last:
                start = last
        return start >= end

    def open(self, file: RangedFile, start: int, end: int) -> Reader:
        """Open the local file at `start`, once everything up to `end` is there."""
        for span, lock in sorted(self._spans.items()):
            if span[0] < end and start < span[1]:
                with lock:
                    if span not in self._held:
                        self._fetch(file, *span)
                        self._held.add(span)
        reader = self.path.open("rb", buffering=0)
        reader.seek(start)
        return reader

    def _fetch(self, file: RangedFile, start: int, end: int) -> None:
        buffer = memoryview(bytearray(min(_KEPT_BYTES, end - start)))
        try:
            self.path.parent.mkdir(exist_ok=True)
            target = os.open(self.path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                os.lseek(target, start, os.SEEK_SET)
                with file.range(start, end) as reader:
                    while (count := reader.readinto(buffer)) != 0:
                        write_all(target, buffer[: count or 0])
            finally:
                os.close(target)
        except OSError as error:
            raise write_failure(self.path.parent.parent / self.path.name, error) from error
