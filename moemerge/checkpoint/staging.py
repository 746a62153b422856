"""Finished or absent: write output beside its target and rename it into place when it is complete."""

import errno
import logging
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from moemerge.checkpoint.copy import write_failure
from moemerge.checkpoint.disk import flush
from moemerge.checkpoint.journal import Journal
from moemerge.checkpoint.output_folder import PARTIAL, Replaceable, beside, check_target, entries, foreign_files
from moemerge.errors import BusyError, OutputError, RefusedError

_OLD: Final = "moemerge-old"
# Without this file no reader takes a folder for a model, so it comes last and goes first.
_SEAL: Final = "config.json"
_log: Final = logging.getLogger(__name__)


def journal_of(stage: Path) -> Journal:
    """The journal of a stage's complete shards; it lies beside the stage."""
    return Journal(stage.with_name(f"{stage.name}.journal"))


def kept_shards(out: Path) -> int:
    """How many complete shards an unfinished merge into `out` has left for `--resume`."""
    stage = _stage(out.resolve())
    return len(journal_of(stage)) if stage.is_dir() else 0


def left_bytes(out: Path) -> int:
    """Disk space in bytes that an unfinished merge into `out` has taken and the next one uses again."""
    stage = _stage(out.resolve())
    return sum(map(_room, stage.iterdir())) if stage.is_dir() else 0


@contextmanager
def locked(folder: Path, out: Path, doing: str) -> Iterator[None]:
    """Keep other processes away from `folder` with a lock beside it; errors name `out`, which the folder serves.

    Folders above it are made, and removed again if nothing is in them at the end.

    Raises:
        BusyError: another process is `doing` the same to `out`.
        OutputError: the system refused to write something.
    """
    lock_file = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(lock_file)
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{out}: another moemerge is {doing} it. Wait for it to end.") from None
    except OSError as error:
        raise _failure(out, error) from error
    try:
        yield
    except OSError as error:
        raise _failure(out, error) from error
    finally:
        with uninterrupted(out):
            with suppress(OSError):  # Windows removes no open file
                lock_file.unlink()
            with suppress(OSError):
                lock.release()
            with suppress(OSError):  # the first that holds something stays, and all above it
                for parent in made:
                    parent.rmdir()


@contextmanager
def uninterrupted(out: Path) -> Iterator[None]:
    """Hold signals back while the work on `out` ends, since there is nothing left to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            _log.warning("%s: the interrupt came when the work on it was ending, and stopped nothing", out)


@contextmanager
def staged(
    out: Path,
    sources: Collection[Path] = (),
    *,
    inputs: Collection[Path] = (),
    replaceable: Replaceable | None = None,
    resume: bool = False,
    temporary: bool = False,
) -> Iterator[Path]:
    """A context with a folder to write into; at its end without an error it becomes `out`, unless it is `temporary`.

    Otherwise it is removed, unless its journal (`journal_of`) names complete shards: then it stays for a run with
    `resume`, and a run without `resume` removes it first.

    A target that is not `temporary` is checked as by `check_target`, before anything is made and again at the end. The
    folder lies beside `out`, so that the end is a rename; where `out` is a mount point it lies inside and its files are
    moved, `config.json` last. Once the output has its name, what cannot be tidied up is logged as a warning.

    Raises:
        RefusedError: see `check_target`.
        BusyError: another process is writing to the same target.
        OutputError: the output cannot be written.
    """

    def check() -> None:
        if not temporary:
            check_target(out, sources, inputs=inputs, replaceable=replaceable)

    target, published = out.resolve(), False
    stage = _stage(target)
    if not _replaced(target).is_dir():
        check()
    with locked(stage, out, "writing to"):
        try:
            _restore(target)
            check()
            _prepare(stage, resume=resume)
            yield stage
            if not temporary:
                flush_all(stage)
            with uninterrupted(out):
                if not temporary:
                    check()
                    _publish(stage, target, replaceable)
                published = True
                with _tidying(out):
                    _discard(stage)
        finally:
            if not published and not len(journal_of(stage)):
                _discard(stage)


@contextmanager
def _tidying(out: Path) -> Iterator[None]:
    """Log what cannot be removed after the output is complete, and go on."""
    try:
        yield
    except OSError as error:
        _log.warning("%s: is complete; something beside it could not be removed (%r)", out, error)


def _stage(target: Path) -> Path:
    """The folder that the output is written to before it is renamed."""
    return beside(target, PARTIAL)


def _room(path: Path) -> int:
    """Bytes on the disk that a file has claimed; 0 where the system does not say."""
    found = path.stat()
    return min(found.st_size, 512 * getattr(found, "st_blocks", 0))


def _failure(out: Path, error: OSError) -> OutputError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return write_failure(out, error)
    return OutputError(
        f"{error.filename or out}: {error.strerror or error}. Choose another output folder, or make way there."
    )


def _prepare(stage: Path, *, resume: bool) -> None:
    """Make an empty stage, or leave one that is to be resumed."""
    if not resume or stage.is_symlink() or not stage.is_dir():
        _discard(stage)
    stage.mkdir(exist_ok=True)


def flush_all(stage: Path) -> None:
    """Wait until a folder with all that it holds is on the disk."""
    for path in (*stage.rglob("*"), stage):
        flush(path)


def _discard(stage: Path) -> None:
    """Remove a stage with its journal."""
    _clear(stage)
    journal_of(stage).remove()


def _clear(stage: Path) -> None:
    """Remove what this process or a killed one has written; a link is removed, never followed."""
    if stage.is_symlink():
        stage.unlink()
    shutil.rmtree(stage, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """The place of the folder that is being replaced until the new one is in its place."""
    return target.parent / f".{target.name}.{_OLD}"


def _restore(target: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    if _replaced(target).is_dir() and not target.exists():
        _replaced(target).rename(target)


def _publish(stage: Path, target: Path, replaceable: Replaceable | None) -> None:
    if stage.parent == target:
        _move_files(stage, target)
    elif not target.exists():
        stage.rename(target)
    elif not any(target.iterdir()):
        target.rmdir()
        stage.rename(target)
    else:
        _replace(stage, target, replaceable)
    with _tidying(target):
        flush(target)
        flush(target.parent)


def _replace(stage: Path, target: Path, replaceable: Replaceable | None) -> None:
    """Move the stage into the place of a folder that has been checked."""
    old = _replaced(target)
    shutil.rmtree(old, ignore_errors=True)
    try:
        target.rename(old)
        _check_replaced(target, old, replaceable)
        stage.rename(target)
    except BaseException:
        _restore(target)
        raise
    with _tidying(target):
        shutil.rmtree(old)


def _check_replaced(target: Path, old: Path, replaceable: Replaceable | None) -> None:
    """Refuse to go on if a file has appeared between the check and the rename."""
    if foreign := foreign_files(old, replaceable(old) or () if replaceable else ()):
        raise RefusedError(f"{target}: {foreign[0]!r} has come into it meanwhile. Move it away, and merge again.")


def _move_files(stage: Path, target: Path) -> None:
    (target / _SEAL).unlink(missing_ok=True)
    for entry in entries(target):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == _SEAL):
        entry.rename(target / entry.name)
