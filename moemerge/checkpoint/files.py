"""Files of weights, on this machine or another, and how their bytes are read."""

import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self


interrupted: Final = threading.Event()
"""Set when the program is interrupted, so that no thread waits for another machine any longer."""


class Readable(Protocol):
    """A source of bytes; each read continues where the last one ended."""

    def readinto(self, view: memoryview, /) -> int | None:
        """Read up to as many bytes as `view` has; 0 at the end, None if none have arrived yet: ask again."""


class Reader(Readable, Protocol):
    """An open file: a context that closes it."""

    def __enter__(self) -> "Self": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def clipped(chunks: Iterable[memoryview], start: int, end: int) -> Iterator[memoryview]:
    """Cut the bytes from `start` up to `end` out of consecutive chunks."""
    done = 0
    for chunk in chunks:
        if done < end and start < done + len(chunk):
            yield chunk[max(0, start - done) : end - done]
        done += len(chunk)


class BlockReader:
    """A reader of data that is computed block by block."""

    def __init__(self, blocks: Generator[bytes | memoryview, None, None]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int | None:
        """Read at most to the end of a block."""
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
    """A file on another machine whose content never changes; if it does, reading fails."""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""

    @property
    def nbytes(self) -> int:
        """The file's size in bytes."""

    @property
    def identity(self) -> str:
        """A value, such as a hash, that differs for any other content."""

    def open(self, start: int, nbytes: int) -> Reader:
        """Open the file for reading `nbytes` bytes from offset `start` on; kept bytes come from a file on the disk.

        Raises:
            SourceError: the bytes cannot be reached; reading may raise it too.
        """

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Keep these bytes in `folder` when they are first read."""


File = Path | RemoteFile


def open_range(file: File, start: int, nbytes: int) -> Reader:
    """Open a file for reading `nbytes` bytes from offset `start` on; the reader of a local file does not end there.

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
    """The size of a file in bytes.

    Raises:
        OSError: it cannot be looked up.
    """
    return file.stat().st_size if isinstance(file, Path) else file.nbytes


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size, times in nanoseconds and inode of a local file, which set it apart from a file that takes its place.

    `cp -p` and `rsync -a` restore the time of modification, but never the time of the inode's change.
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
    """A value that changes with the file's content: the stamp of a local file, the identity of a remote one."""
    return Stamp.of(file) if isinstance(file, Path) else file.identity


def read_exactly(reader: Readable, nbytes: int) -> bytes:
    """Read the next `nbytes` bytes, or fewer where the file ends."""
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        count = reader.readinto(view)
        if count == 0:
            return bytes(data[: nbytes - len(view)])
        view = view[count or 0 :]
    return bytes(data)
