"""Replace files of a model's folder by new ones, all or none, and go back until that is made final.

The folder `.NAME.moemerge-undo` beside the model takes first the new files, then those that they replaced, by renames
alone. Its journal says which files leave and which come. If the process is killed, the next command on the model
finishes what was begun. While files are moved, the model has no `config.json`: whoever opens it then finds no model,
and never one of old and new files.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from moemerge.checkpoint.change_journal import DRAFT, JOURNAL, Change, State, stamps
from moemerge.checkpoint.copy import copy_file
from moemerge.checkpoint.disk import flush
from moemerge.checkpoint.output_folder import PARTIAL, TUNE, UNDO, beside, check_space
from moemerge.checkpoint.staging import flush_all, locked, uninterrupted
from moemerge.errors import OutputError, RefusedError

# Without this file no reader takes a folder for a model, so it goes first and comes last.
_SEAL: Final = "config.json"
_WEIGHTS: Final = {".safetensors", ".bin"}
_OLD, _NEW = "old", "new"


@contextmanager
def changing(model: Path, nbytes: int = 0) -> Iterator[Path]:
    """A context that keeps other processes away from a model, with a folder for its new files.

    What is written there becomes part of the model by `replace_model`; without that it is removed at the end. What an
    earlier process left unfinished is finished first; see `recover`.

    Args:
        model: the model's folder.
        nbytes: the space that the new files need.

    Raises:
        RefusedError: the last change has not been made final.
        BusyError: another process is writing to the model.
        OutputError: the folder cannot be written to, or the disk has too little space.
    """
    check_changeable(model, nbytes)
    work = _work(model)
    with _held(model):
        _finish(model)
        _check_final(model)
        (work / _NEW).mkdir(parents=True)
        try:
            yield work / _NEW
        finally:
            if Change.read(work) is None:
                _discard(work)


def check_changeable(model: Path, nbytes: int = 0) -> None:
    """Refuse a model whose files cannot be replaced, before anything is computed; see `changing`."""
    model = model.resolve()
    folder = model
    try:
        for folder in (model, _work(model).parent):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(
            f"{model}: cannot be changed: in {folder} no file can be made ({error.strerror}). Write the changed model "
            "to another folder."
        ) from error
    check_space(model, nbytes, what="what changes, beside what it replaces,")
    _check_final(model)


def replace_model(model: Path, removed: Collection[str] = ()) -> None:
    """Move the files of the folder that `changing` gave into the model, in the place of those of the same paths.

    The files that they replace can be brought back by `undo`, until `commit` removes them. Files that are neither
    replaced nor `removed` stay as they are.

    Args:
        model: the model's folder, within `changing`.
        removed: paths within it of other files that leave it.

    Raises:
        OutputError: a file could not be moved; the next command on the model goes on.
        CheckpointError: there is no `config.json`, neither here nor among the new files.
    """
    model = model.resolve()
    work = _work(model)
    if not (work / _NEW / _SEAL).exists():
        copy_file(model / _SEAL, work / _NEW / _SEAL)
    (work / _OLD).mkdir()
    flush_all(work)
    names = [path.relative_to(work / _NEW).as_posix() for path in (work / _NEW).rglob("*") if not path.is_dir()]
    new, old = stamps(work / _NEW, names), stamps(model, {*names, *removed})
    weights = [path.name for path in model.iterdir() if path.suffix in _WEIGHTS and path.name not in old]
    with uninterrupted(model):
        Change("replacing", old, new, stamps(model, weights)).write(work, "replacing")
        _finish(model)


def undo(model: Path) -> None:
    """Bring back the model as it was before the last change, file by file the same, and forget the change.

    Raises:
        RefusedError: there is nothing to undo, or the model was changed in another way meanwhile; names a file.
        BusyError: another process is writing to the model.
        OutputError: a file could not be moved; the next command on the model goes on.
    """
    model = model.resolve()
    with _held(model):
        if _finish(model) == "undone":
            return
        change = _replaced(model, "undo")
        if name := next(change.changed_since(model), None):
            raise RefusedError(
                f"{model}: {name} is not as the last edit left it, and undoing that would lose or mix something. Move "
                "it away or back, and undo again; or make the edit final with --commit."
            )
        with uninterrupted(model):
            change.write(_work(model), "undoing")
            _finish(model)


def commit(model: Path) -> None:
    """Make the last change final: remove the files that it replaced.

    Raises:
        RefusedError: there is nothing to make final.
        BusyError: another process is writing to the model.
        OutputError: a file could not be removed; the next command on the model goes on.
    """
    model = model.resolve()
    with _held(model):
        if _finish(model) != "committed":
            _replaced(model, "make final").write(_work(model), "committed")
            _finish(model)


def undoable_bytes(model: Path) -> int:
    """Size in bytes of the files that are kept for `undo`, which `commit` frees; 0 where nothing can be undone."""
    change = Change.read(_work(model))
    return sum(stamp[0] for stamp in change.old.values()) if change and change.state == "replaced" else 0


def is_unfinished(model: Path) -> bool:
    """Whether a process was killed while it moved a model's files; the model cannot be opened before `recover`."""
    change = Change.read(_work(model))
    return change is not None and change.state in {"replacing", "undoing"}


def is_being_undone(model: Path) -> bool:
    """Whether a process was killed while `undo` moved a model's files."""
    change = Change.read(_work(model))
    return change is not None and change.state == "undoing"


def recover(model: Path) -> bool:
    """Finish what a process that was killed has begun: the model is the old one or the new one then.

    Returns:
        Whether there was anything to finish.

    Raises:
        BusyError: that process is still at work, or another one is writing to the model.
        RefusedError: a file has taken the place of one that is to be moved; names it.
        OutputError: a file could not be moved.
    """
    if not _work(model).exists():
        return False
    with _held(model):
        return _finish(model) is not None


def _work(model: Path) -> Path:
    return beside(model.resolve(), UNDO)


@contextmanager
def _held(model: Path) -> Iterator[None]:
    """Keep processes away that change, tune or overwrite the model."""
    with ExitStack() as held:
        for purpose in (UNDO, TUNE, PARTIAL):
            held.enter_context(locked(beside(model.resolve(), purpose), model, "writing to"))
        yield


def _check_final(model: Path) -> None:
    if (change := Change.read(_work(model))) and change.state == "replaced":
        raise RefusedError(
            f"{model}: its last edit can still be undone. Make it final with --commit, or go back with --undo; then "
            "edit again."
        )


def _replaced(model: Path, doing: str) -> Change:
    change = Change.read(_work(model))
    if change is None:
        raise RefusedError(f"{model}: there is no edit to {doing}: none was made in place, or it was made final.")
    return change


def _finish(model: Path) -> State | None:
    """Do what is left of a change and return the state that this reaches; None where nothing is left to do."""
    model = model.resolve()
    work = _work(model)
    change = Change.read(work)
    if change and change.state == "replaced":
        return None
    try:
        if change is None:  # killed while the new files were written, or when all was removed
            _discard(work)
            return None
        if change.state == "replacing":
            _swap(model, (change.old, work / _OLD), (change.new, work / _NEW))
            return change.write(work, "replaced").state
        if change.state == "undoing":
            _swap(model, (change.new, work / _NEW), (change.old, work / _OLD))
            change = change.write(work, "undone")
        _remove(work)
    except OSError as error:
        raise OutputError(
            f"{error.filename or model}: cannot be moved or removed ({error.strerror}). When it can, the next "
            "`moemerge edit` on the model goes on."
        ) from error
    return change.state


_Side = tuple[Collection[str], Path]
"""Paths of files within the model, and the folder that holds them while they are not in it."""


def _swap(model: Path, leaving: _Side, coming: _Side) -> None:
    """Move files out of the model and others in; after a crash the same call does what is left."""
    for name in sorted(leaving[0], key=lambda name: (name != _SEAL, name)):
        arrived = name in coming[0] and not os.path.lexists(coming[1] / name)
        if not arrived and os.path.lexists(model / name) and not os.path.lexists(leaving[1] / name):
            _move(model / name, leaving[1] / name)
        if name == _SEAL:
            flush(model)
    flush(model)
    for name in sorted(coming[0], key=lambda name: (name == _SEAL, name)):
        if name == _SEAL:
            flush(model)
        if os.path.lexists(coming[1] / name):
            if os.path.lexists(model / name):
                raise RefusedError(f"{model}: {name} has come into it meanwhile. Move it away, and try again.")
            _move(coming[1] / name, model / name)
    for folder in {(model / name).parent for name in leaving[0]} - {model}:
        with suppress(OSError):  # something is still in it
            folder.rmdir()
    for folder in (model, leaving[1], coming[1]):
        flush(folder)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _discard(work: Path) -> None:
    """Remove new files that never became part of the model."""
    if (work / _NEW).exists():
        shutil.rmtree(work / _NEW)
    (work / DRAFT).unlink(missing_ok=True)
    for folder in (work / _OLD, work):
        with suppress(FileNotFoundError):
            folder.rmdir()  # no old file is ever removed here


def _remove(work: Path) -> None:
    """Remove the folder; its journal goes last, so that what is left after a crash is known."""
    for folder in (work / _OLD, work / _NEW):
        if folder.exists():
            shutil.rmtree(folder)
    for name in (DRAFT, JOURNAL):
        (work / name).unlink(missing_ok=True)
    work.rmdir()
