"""A file of weights, on this machine or on another: how its bytes are reached."""

import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self


interrupted: Final = threading.Event()
"""Set by who interrupts the program: no thread then waits for another machine any longer."""


class Readable(Protocol):
    """What bytes are read from, each read where the last one ended."""

    def readinto(self, view: memoryview, /) -> int | None:
        """Read up to as many bytes as `view` has; 0 at the end, None where none have come yet: ask again."""


class Reader(Readable, Protocol):
    """An open file: a context that closes it."""

    def __enter__(self) -> "Self": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def clipped(chunks: Iterable[memoryview], start: int, end: int) -> Iterator[memoryview]:
    """Of chunks that follow each other, the bytes from `start` up to `end`."""
    done = 0
    for chunk in chunks:
        if done < end and start < done + len(chunk):
            yield chunk[max(0, start - done) : end - done]
        done += len(chunk)


class BlockReader:
    """A reader of what is computed block by block."""

    def __init__(self, blocks: Generator[bytes | memoryview, None, None]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int | None:
        """Read from a block, and no further."""
        if not self._left:
            self._left = memoryview(next((block for block in self._blocks if block), b""))
        count = min(len(view), len(self._left))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks.close()


class RemoteFile(Protocol):
    """A file on another machine, which never changes under its name: else reading it fails."""

    @property
    def name(self) -> str:
        """Without the folder."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    @property
    def identity(self) -> str:
        """What another content would not have: a hash, or the like."""

    def open(self, start: int, nbytes: int) -> Reader:
        """Read `nbytes` bytes from offset `start` on; from the disk, as a file at that offset, where they are kept.

        Raises:
            SourceError: they cannot be reached; reading may raise it too.
        """

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """From now on, keep these bytes in `folder` when they are first read."""


File = Path | RemoteFile


def open_range(file: File, start: int, nbytes: int) -> Reader:
    """Open a file for reading `nbytes` bytes from offset `start` on; a file on this machine does not end there.

    Raises:
        OSError: it cannot be opened.
        SourceError: it cannot be reached.
    """
    if not isinstance(file, Path):
        return file.open(start, nbytes)
    reader = file.open("rb", buffering=0)
    reader.seek(start)
    return reader


def size_of(file: File) -> int:
    """Bytes of a file.

    Raises:
        OSError: it cannot be looked up.
    """
    return file.stat().st_size if isinstance(file, Path) else file.nbytes


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a local file from what takes its place: the times in nanoseconds, and the inode.

    A copy with `cp -p` or `rsync -a` restores the time of modification, never that of the inode's change.
    """

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp of the file that a path leads to now.

        Raises:
            OSError: it cannot be looked up.
        """
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def fingerprint_of(file: File) -> Stamp | str:
    """What a change of a file's content would change: its stamp, or its identity on another machine."""
    return Stamp.of(file) if isinstance(file, Path) else file.identity


def read_exactly(reader: Readable, nbytes: int) -> bytes:
    """The next `nbytes` bytes, or fewer where the file ends."""
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        count = reader.readinto(view)
        if count == 0:
            return bytes(data[: nbytes - len(view)])
        view = view[count or 0 :]
    return bytes(data)
