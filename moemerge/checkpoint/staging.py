"""Finished or absent: output is written beside its target and renamed into place when it is complete."""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from moemerge.checkpoint.disk import flush, nearest_folder
from moemerge.checkpoint.journal import Journal
from moemerge.errors import BusyError, OutputError, RefusedError

_PARTIAL: Final = "moemerge-partial"
_OLD: Final = "moemerge-old"
# Without this file no reader takes a folder for a model, so it comes last and goes first.
_SEAL: Final = "config.json"
# What marks a folder as a checkpoint, and what one may hold: --overwrite replaces nothing else.
_CHECKPOINT_MARK: Final = re.compile(r"config\.json|.+\.safetensors")
_CHECKPOINT_FILE: Final = re.compile(
    r".+\.(safetensors|json|jinja|model|bin|txt|ya?ml|md|gguf)|LICENSE.*|\.gitattributes|\." + _PARTIAL
)


def check_target(out: Path, sources: Collection[Path], *, overwrite: bool, offered: bool = True) -> None:
    """Refuse a target that would lose something; where --overwrite is not `offered`, nothing is said of it.

    Raises:
        RefusedError: not a folder, not empty without `overwrite`, holds other things than a checkpoint, or holds or
            lies within a source.
    """
    resolved = out.resolve()
    if resolved.exists() and not resolved.is_dir():
        raise RefusedError(f"{out}: exists and is not a folder. Choose another output folder.")
    for source in sources:
        if resolved == source or resolved in source.parents or source in resolved.parents:
            raise RefusedError(f"{out}: is, holds or lies within the model {source}. Choose another output folder.")
    entries = _entries(resolved)
    if entries and not overwrite:
        raise RefusedError(
            f"{out}: is not empty ({len(entries)} entries, among them {min(e.name for e in entries)!r}). "
            f"Choose another output folder, or {'replace this one with --overwrite' if offered else 'remove this one'}."
        )
    if entries and not any(_CHECKPOINT_MARK.fullmatch(e.name) for e in entries):
        raise RefusedError(
            f"{out}: holds no checkpoint, neither config.json nor *.safetensors; --overwrite replaces nothing else. "
            "Choose another output folder."
        )
    foreign = sorted(e.name for e in entries if e.is_dir() or not _CHECKPOINT_FILE.fullmatch(e.name))
    if foreign:
        raise RefusedError(
            f"{out}: holds {foreign[0]!r}, which is no part of a model ({len(foreign)} such entries), and --overwrite "
            "replaces the whole folder. Move it away, or choose another output folder."
        )


def journal_of(stage: Path) -> Journal:
    """The journal of what is complete in a stage, beside it."""
    return Journal(stage.with_name(f"{stage.name}.journal"))


def kept_shards(out: Path) -> int:
    """How many complete shards an unfinished merge into `out` has left for `--resume`."""
    stage = _stage(out.resolve())
    return len(journal_of(stage)) if stage.is_dir() else 0


def check_space(out: Path, nbytes: int) -> None:
    """Refuse to start what the disk cannot hold; what an unfinished merge has left there is used again.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    stage = _stage(out.resolve())
    left = sum(map(_room, stage.iterdir())) if stage.is_dir() else 0
    free = shutil.disk_usage(nearest_folder(out)).free
    if free + left < nbytes:
        raise OutputError(
            f"{out}: the merged model takes {nbytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free. "
            "Free some space, or write to another disk."
        )


@contextmanager
def locked(folder: Path, out: Path, doing: str) -> Iterator[None]:
    """Keep other processes away from `folder`, beside which the lock lies; errors name `out`, which it serves.

    Raises:
        BusyError: another process is `doing` the same to `out`.
        OutputError: the system refused to write something.
    """
    lock_file = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(lock_file)
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
        with suppress(OSError):  # Windows removes no open file
            lock_file.unlink()
        lock.release()


@contextmanager
def staged(
    out: Path, sources: Collection[Path] = (), *, overwrite: bool = False, resume: bool = False, temporary: bool = False
) -> Iterator[Path]:
    """A folder to write into; when the block ends without an error it becomes `out`, unless it is `temporary`.

    Otherwise it is removed, unless its journal (`journal_of`) names complete shards: then it stays for a run with
    `resume`, and a run without `resume` removes it first.

    A target that is not `temporary` is checked as by `check_target`, at the start and again at the end: it may have
    been filled meanwhile. The folder lies beside `out`, so that the end is a rename; where `out` is a mount point it
    lies inside and its files are moved, `config.json` last.

    Raises:
        RefusedError: see `check_target`.
        BusyError: another process is writing to the same target.
        OutputError: it cannot be written.
    """
    target = out.resolve()
    stage = _stage(target)
    journal = journal_of(stage)
    with locked(stage, out, "writing to"):
        try:
            _restore(target)
            if not temporary:
                check_target(out, sources, overwrite=overwrite)
            if not resume or stage.is_symlink() or not stage.is_dir():
                _clear(stage)
                journal.remove()
            stage.mkdir(exist_ok=True)
            yield stage
            if not temporary:
                check_target(out, sources, overwrite=overwrite)
                _publish(stage, target)
            journal.remove()
        finally:
            if not len(journal):
                _clear(stage)
                journal.remove()


def beside(target: Path, purpose: str) -> Path:
    """A hidden name beside the resolved `target`, or inside it where it is a mount point: a rename leads from there."""
    return target / f".{purpose}" if os.path.ismount(target) else target.parent / f".{target.name}.{purpose}"


def _stage(target: Path) -> Path:
    """Where the output is written."""
    return beside(target, _PARTIAL)


def _room(path: Path) -> int:
    """Bytes on the disk that a file has claimed; where the system does not say, none."""
    found = path.stat()
    return min(found.st_size, 512 * getattr(found, "st_blocks", 0))


def _failure(out: Path, error: OSError) -> OutputError:
    return OutputError(f"{error.filename or out}: {error.strerror or error}.")


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [e for e in folder.iterdir() if not e.name.startswith(".moemerge-") and e.name != "lost+found"]


def _clear(stage: Path) -> None:
    """Remove what this or a killed process has written; a link is removed, never followed."""
    if stage.is_symlink():
        stage.unlink()
    shutil.rmtree(stage, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where the folder that is being replaced lies until the new one is in place."""
    return target.parent / f".{target.name}.{_OLD}"


def _restore(target: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    if _replaced(target).is_dir() and not target.exists():
        _replaced(target).rename(target)


def _publish(stage: Path, target: Path) -> None:
    for path in (*stage.iterdir(), stage):
        flush(path)
    _rename(stage, target)
    flush(target)
    flush(target.parent)


def _rename(stage: Path, target: Path) -> None:
    if stage.parent == target:
        _move_files(stage, target)
    elif not target.exists():
        stage.rename(target)
    elif not any(target.iterdir()):
        target.rmdir()
        stage.rename(target)
    else:
        shutil.rmtree(_replaced(target), ignore_errors=True)
        try:
            target.rename(_replaced(target))
            stage.rename(target)
        except BaseException:
            _restore(target)
            raise
        with suppress(KeyboardInterrupt):  # the output is complete; what is left of the old one goes with the next
            shutil.rmtree(_replaced(target), ignore_errors=True)


def _move_files(stage: Path, target: Path) -> None:
    (target / _SEAL).unlink(missing_ok=True)
    for entry in _entries(target):
        entry.unlink()
    for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == _SEAL):
        entry.rename(target / entry.name)
