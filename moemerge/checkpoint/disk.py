"""Requests to the operating system about a file's bytes: reserve space, flush them, drop them from the page cache."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal


def shown_bytes(nbytes: float) -> str:
    """Format a number of bytes in decimal units as on the Hub: `5.00 GB`, `12 B`."""
    for unit, width in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= width:
            return f"{nbytes / width:.2f} {unit}"
    return f"{nbytes:.0f} B"


def limit_of(what: Literal["FSIZE", "AS"]) -> int | None:
    """The largest file in bytes (`ulimit -f`) or address space of this process (`ulimit -v`); None for no limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(getattr(resource, f"RLIMIT_{what}"))[0]
    return None if limit == resource.RLIM_INFINITY else limit


def allow_open_files(wanted: int) -> int:
    """Raise the limit of open files (`ulimit -n`) to `wanted` as far as the system allows; returns the limit."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(OSError, ValueError):  # some systems have a lower limit than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def nearest_folder(path: Path) -> Path:
    """The folder `path`, or the nearest one above it that exists."""
    resolved = path.resolve()
    return next(parent for parent in (resolved, *resolved.parents) if parent.is_dir())


def cache_folder(kind: str) -> Path | None:
    """The folder of one kind of files in the user's cache: `moemerge/KIND` in XDG_CACHE_HOME, else in `~/.cache`.

    None where there is neither, as for a user of a container that has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moemerge" / kind
    except RuntimeError:
        return None


def allocate(file: int, nbytes: int, *, reserve: bool) -> None:
    """Make an open file `nbytes` long and reserve its space if possible, so that a full disk is noticed now.

    `os.posix_fallocate` is not used: where a file system cannot reserve (network, FUSE), glibc writes a byte into every
    block.

    Raises:
        OSError: the disk is full.
    """
    if reserve and sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) == 0:
            return
        if ctypes.get_errno() in {errno.ENOSPC, errno.EDQUOT}:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.ftruncate(file, nbytes)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk as far as the system knows."""
    if path.is_dir():
        with suppress(OSError):  # Windows opens no folders, some file systems flush none
            _flush(path, os.O_RDONLY)
    else:
        try:
            _flush(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        except PermissionError:  # one that may only be read
            _flush(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A context with a draft to write to; at the end it is flushed and renamed to `path`, which appears whole."""
    draft = path.with_name(f"{path.name}.new")
    try:
        yield draft
        flush(draft)
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def forget(file: int, *, written: bool = False) -> None:
    """Let the page cache drop an open file's bytes where the system can; written bytes are flushed first."""
    if hasattr(os, "posix_fadvise"):
        if written:
            os.fdatasync(file)
        with suppress(OSError):  # advice may be refused
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _flush(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)
