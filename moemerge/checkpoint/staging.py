"""Finished or absent: output is written beside its target and renamed into place when it is complete."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from moemerge.errors import OutputError, RefusedError

_LOCK: Final = ".lock"
_PARTIAL: Final = "moemerge-partial"
_OLD: Final = "moemerge-old"
# Without this file no reader takes a folder for a model, so it comes last and goes first.
_SEAL: Final = "config.json"
# What a checkpoint folder may hold: --overwrite replaces a folder only when nothing else would be lost.
_CHECKPOINT_FILE: Final = re.compile(
    r".+\.(safetensors|json|jinja|model|bin|txt|ya?ml|md|gguf)|LICENSE.*|\.gitattributes|\." + _PARTIAL
)


def check_target(out: Path, sources: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse a target that would lose something.

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
            "Choose another output folder, or replace this one with --overwrite."
        )
    foreign = sorted(e.name for e in entries if e.is_dir() or not _CHECKPOINT_FILE.fullmatch(e.name))
    if foreign:
        raise RefusedError(
            f"{out}: holds {foreign[0]!r}, which is no part of a model ({len(foreign)} such entries), and --overwrite "
            "replaces the whole folder. Move it away, or choose another output folder."
        )


def check_space(out: Path, nbytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    folder = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"{out}: the merged model takes {nbytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free. "
            "Free some space, or write to another disk."
        )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write into; when the block ends without an error it becomes `out`, otherwise it is removed.

    Whatever `out` held is replaced: see `check_target`. The folder lies beside `out`, so that the end is a rename;
    where `out` is a mount point it lies inside and its files are moved, `config.json` last.

    Raises:
        OutputError: another process is writing to the same target, or it cannot be written.
    """
    target = out.resolve()
    stage = target / f".{_PARTIAL}" if os.path.ismount(target) else target.parent / f".{target.name}.{_PARTIAL}"
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(stage)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}.") from error
    try:
        yield stage
        lock.release()
        (stage / _LOCK).unlink(missing_ok=True)
        _publish(stage, target)
    except OSError as error:
        raise OutputError(f"{error.filename or out}: {error.strerror}.") from error
    finally:
        lock.release()
        shutil.rmtree(stage, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if entry.name not in {f".{_PARTIAL}", "lost+found"}]


def _claim(stage: Path) -> FileLock:
    """Create the stage, or take over one whose process is gone; the lock dies with its process."""
    lock = FileLock(stage / _LOCK)
    with suppress(FileExistsError):
        stage.mkdir()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"{stage}: another moemerge is writing to the same output. Wait for it to end.") from None
    for entry in stage.iterdir():
        if entry.name != _LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return lock


def _publish(stage: Path, target: Path) -> None:
    if stage.parent == target:
        _move_files(stage, target)
    elif not target.exists():
        stage.rename(target)
    elif not any(target.iterdir()):
        target.rmdir()
        stage.rename(target)
    else:
        old = target.parent / f".{target.name}.{_OLD}"
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        try:
            stage.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)


def _move_files(stage: Path, target: Path) -> None:
    (target / _SEAL).unlink(missing_ok=True)
    for entry in _entries(target):
        entry.unlink()
    for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == _SEAL):
        entry.rename(target / entry.name)
    stage.rmdir()
