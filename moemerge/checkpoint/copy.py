"""Copy bytes from file to file unchanged: by the kernel where it can, through one bounded buffer elsewhere."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from moemerge.checkpoint.header import BLOCK_BYTES
from moemerge.errors import CheckpointError, OutputError

BUFFER_BYTES: Final = 8 * 2**20
# A kernel call that fails with one of these cannot serve these two files; the next slower way is tried.
_NOT_HERE: Final = {
    errno.ENOSYS,
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,
    errno.ENOTSOCK,
}

Report = Callable[[int], None]
"""Called with the number of bytes done since the last call; may raise to stop the copy."""


def copy_range(  # noqa: PLR0917  offsets and length as in os.copy_file_range
    source: int,
    start: int,
    target: int,
    target_start: int,
    nbytes: int,
    report: Report,
    *,
    chunk_bytes: int,
) -> int:
    """Copy `nbytes` bytes from offset `start` of one open file to offset `target_start` of another.

    Uses `os.copy_file_range`, else `os.sendfile`, else reads and writes. `target` must not be shared with another
    thread. Where a file system shares extents it does so from one block border to another: the first step leads up to
    one, if both files reach theirs together.

    `report` is called after each step of at most `chunk_bytes`.

    Returns:
        How many bytes were copied: less than `nbytes` where the source ends.

    Raises:
        OSError: the source cannot be read or the target cannot be written.
    """
    done = 0
    ways = [_copy_file_range, _sendfile, _read_and_write]
    while done < nbytes:
        step = min(nbytes - done, chunk_bytes)
        if done == 0 and (start - target_start) % BLOCK_BYTES == 0:
            step = min(step, -start % BLOCK_BYTES or step)
        try:
            moved = ways[0](source, start + done, target, target_start + done, step)
        except OSError as error:
            if error.errno in _NOT_HERE and len(ways) > 1:
                ways.pop(0)
                continue
            raise
        if moved == 0 and len(ways) > 1:
            ways.pop(0)  # some file systems answer 0 where they mean "not here"
            continue
        if moved == 0:
            break
        done += moved
        report(moved)
    return done


_SMALLER: Final = {
    ".gguf": "Choose a --type with fewer bits, or write to another disk.",
    ".html": "Route fewer texts, or write to another disk.",
}


def write_failure(path: Path, error: OSError) -> OutputError:
    """The error for an output file `path` that could not be written."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return OutputError(f"{path}: the disk is full. Free some space, or write to another disk.")
    if error.errno == errno.EFBIG:
        advice = _SMALLER.get(path.suffix, "Lower --max-shard-size.")
        return OutputError(f"{path}: is larger than this file system, or the limit of `ulimit -f`, allows. {advice}")
    return OutputError(f"{path}: cannot be written: {error.strerror or error}.")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file that belongs beside weights; an error names the file that could not be read or written.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the target cannot be written.
    """
    try:
        reader = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}.") from error
    with reader:
        try:
            with target.open("wb") as writer:
                for chunk in iter(partial(_read_chunk, reader, source), b""):
                    writer.write(chunk)
        except OSError as error:
            raise write_failure(target, error) from error


def _read_chunk(reader: BinaryIO, source: Path) -> bytes:
    try:
        return reader.read(BUFFER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}.") from error


def _copy_file_range(source: int, start: int, target: int, target_start: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, target, nbytes, start, target_start)


def _sendfile(source: int, start: int, target: int, target_start: int, nbytes: int) -> int:
    if not hasattr(os, "sendfile"):
        raise OSError(errno.ENOSYS, "no sendfile")
    os.lseek(target, target_start, os.SEEK_SET)
    return os.sendfile(target, source, start, nbytes)


def _read_and_write(source: int, start: int, target: int, target_start: int, nbytes: int) -> int:
    os.lseek(source, start, os.SEEK_SET)
    chunk = os.read(source, min(nbytes, BUFFER_BYTES))
    os.lseek(target, target_start, os.SEEK_SET)
    write_all(target, chunk)
    return len(chunk)


def write_all(target: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the file's position; `os.write` alone may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
