"""Checks of the folder that output goes to: can it be written, would something be lost, is there enough space?"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from moemerge.checkpoint.change_journal import Change
from moemerge.checkpoint.disk import allow_open_files, limit_of, nearest_folder, shown_bytes
from moemerge.errors import OutputError, RefusedError

PARTIAL: Final = "moemerge-partial"
TUNE: Final = "moemerge-tune"
UNDO: Final = "moemerge-undo"
# Names that moemerge itself keeps in a folder that is a mount point, and that file systems keep there.
_KEPT: Final = re.compile(rf"\.({PARTIAL}|{TUNE}|{UNDO})(\..+)?|lost\+found")
# Also one without a path, as of a shell variable that is empty. A `Path` of an address has one slash at most.
_ADDRESS: Final = re.compile(r"([A-Za-z][A-Za-z0-9]+):(?:/+(.*))?", re.DOTALL)
# The longest name beside an output is that of its journal's draft.
_LONGEST_NAME: Final = f".{{}}.{PARTIAL}.journal.new"
# Each thread has a source and a shard open, and a connection where it reads from the Hub.
_OPEN_FILES: Final = 256
_FEWEST_OPEN_FILES: Final = 32
# Libraries and thread stacks take more addresses than memory.
_ADDRESSES_BYTES: Final = 600_000_000

Replaceable = Callable[[Path], Collection[str] | None]
"""A function from a folder to the files in it that may be replaced (relative paths); None without a checkpoint."""


def check_target(
    out: Path,
    sources: Collection[Path] = (),
    *,
    inputs: Collection[Path] = (),
    replaceable: Replaceable | None = None,
    offered: bool = True,
) -> None:
    """Refuse a target that cannot be written, or that would lose something; nothing is left on the disk.

    Args:
        out: the folder.
        sources: folders of models that are read.
        inputs: other files that are read, which `out` must not hold.
        replaceable: what may be replaced in a folder that is not empty; None for nothing.
        offered: whether to mention --overwrite where the folder is not empty.

    Raises:
        RefusedError: not a folder; not empty without `replaceable`; holds a file that is not to be replaced; is, holds
            or lies within a source; or its name cannot be used.
        OutputError: the system does not let it be written.
    """
    try:
        resolved = _resolved(out)
        if resolved.exists() and not resolved.is_dir():
            raise RefusedError(f"{out}: exists and is not a folder. Choose another output folder.")
        for source in sources:
            if resolved == source:
                raise RefusedError(f"{out}: is one of the models that are read. Choose another output folder.")
            if resolved in source.parents or source in resolved.parents:
                raise RefusedError(f"{out}: holds or lies within the model {source}. Choose another output folder.")
        held = entries(resolved)
        if held:
            _check_entries(out, resolved, held, inputs=inputs, replaceable=replaceable, offered=offered)
    except OSError as error:
        wrong = RefusedError if error.errno == errno.ENAMETOOLONG else OutputError
        raise wrong(f"{out}: cannot be looked up: {error.strerror or error}. Choose another output folder.") from error
    check_writable(out)


def nothing_to_resume(out: object) -> RefusedError:
    """The error for `--resume` where a merge has ended; `out` is the folder, or its address in a store."""
    return RefusedError(
        f"{out}: holds a complete merge, so there is nothing to resume. `moemerge verify {out}` checks it; --overwrite "
        "merges again and replaces it."
    )


def check_scratch(out: Path, sources: Collection[Path]) -> None:
    """Refuse a folder that cannot be written beside for a while; it may hold anything, but lie within no source.

    Raises:
        RefusedError: it lies within a source, or its name cannot be used.
        OutputError: the system does not let anything be written there.
    """
    resolved = _resolved(out)
    for source in sources:
        if source in resolved.parents:
            raise RefusedError(f"{out}: lies within the model {source}. Choose another output folder.")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Refuse a folder if the system lets nothing be written beside it; nothing is left on the disk.

    Raises:
        OutputError: says what the system said.
        RefusedError: a parent is not a folder, or the name is too long.
    """
    resolved = _resolved(out)
    above = next((parent for parent in resolved.parents if os.path.lexists(parent)), resolved)
    if not above.is_dir():
        raise RefusedError(f"{out}: {above} is not a folder. Choose another output folder.")
    folder = nearest_folder(beside(resolved, PARTIAL).parent)
    try:
        with suppress(FileNotFoundError):
            os.lstat(folder / _LONGEST_NAME.format(resolved.name))
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RefusedError(
                f"{out}: its name is too long. While it is written, its name is used with {len(_LONGEST_NAME) - 2} "
                "letters more. Choose a shorter one."
            ) from error
        raise OutputError(
            f"{out}: cannot be written: in {folder} no file can be made ({error.strerror or error}). "
            "Choose another output folder."
        ) from error


def beside(target: Path, purpose: str) -> Path:
    """A hidden path beside the resolved `target`, or inside it if it is a mount point: a rename leads to it."""
    return target / f".{purpose}" if os.path.ismount(target) else target.parent / f".{target.name}.{purpose}"


def check_space(out: Path, nbytes: int, *, left: int = 0, what: str = "the merged model") -> None:
    """Refuse to start if the disk has too little space.

    Args:
        out: the folder that is written.
        nbytes: the space that is needed.
        left: the part of it that an unfinished run has left there and that is used again.
        what: what needs the space, for the message.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(nearest_folder(out)).free
    if free + left < nbytes:
        raise OutputError(
            f"{out}: {what} takes {shown_bytes(nbytes)}, but the disk has {shown_bytes(free)} free. "
            "Free some space, or write to another disk."
        )


def check_limits(out: Path, *, largest: int, memory: int, in_shards: bool = True) -> None:
    """Refuse to start if limits of this process (`ulimit`) would end it; that of open files is raised if it can be.

    Args:
        out: the file or folder that is written.
        largest: bytes of its largest file.
        memory: bytes that the work is expected to take.
        in_shards: whether `out` is a folder of shards, which could be smaller, and not one file.

    Raises:
        OutputError: says which limit is too low.
    """
    if (limit := limit_of("FSIZE")) is not None and limit < largest:
        what, else_ = ("its largest file has", ", or lower --max-shard-size") if in_shards else ("takes up to", "")
        raise OutputError(
            f"{out}: {what} {shown_bytes(largest)}, but this process may write files of "
            f"{shown_bytes(limit)} at most. Raise the limit with `ulimit -f unlimited`{else_}."
        )
    if (limit := limit_of("AS")) is not None and limit < memory + _ADDRESSES_BYTES:
        raise OutputError(
            f"{out}: about {shown_bytes(memory + _ADDRESSES_BYTES)} of address space are needed, but this process "
            f"may use {shown_bytes(limit)}. Raise the limit with `ulimit -v unlimited`."
        )
    if (allowed := allow_open_files(_OPEN_FILES)) < _FEWEST_OPEN_FILES:
        raise OutputError(
            f"{out}: this process may have {allowed} files open, and {_FEWEST_OPEN_FILES} are needed. Raise the limit "
            f"with `ulimit -n {_OPEN_FILES}`."
        )


def entries(folder: Path) -> list[Path]:
    """List what a folder holds, without what moemerge itself and file systems keep there."""
    if not folder.is_dir():
        return []
    is_mount = os.path.ismount(folder)
    return [entry for entry in folder.iterdir() if not (is_mount and _KEPT.fullmatch(entry.name))]


def foreign_files(folder: Path, allowed: Collection[str]) -> list[str]:
    """Paths of all files within a folder that are not `allowed`; GGUF files, which may be hours of work, come first."""
    found = (name for entry in entries(folder) for name in _within(entry, folder) if name not in allowed)
    return sorted(found, key=lambda name: (not name.lower().endswith(".gguf"), name))


def _within(entry: Path, folder: Path) -> Iterator[str]:
    """Yield an entry's own path, or the paths of all that a folder holds; for an empty folder, its own."""
    children = list(entry.iterdir()) if entry.is_dir() and not entry.is_symlink() else []
    for child in children:
        yield from _within(child, folder)
    if not children:
        yield entry.relative_to(folder).as_posix()


def _resolved(out: Path) -> Path:
    """Resolve the output folder, following links.

    Raises:
        RefusedError: its name is not text, or its links form a ring, or it is an address.
    """
    if match := _ADDRESS.fullmatch(str(out)):
        raise RefusedError(
            f"{match[1]}://{match[2] or ''}: is an address, and this writes to a folder on this machine. Name a "
            "folder, and copy it there; only merges of dense models write to object stores, as to s3://BUCKET/PATH."
        )
    try:
        str(out).encode()
        resolved = Path(os.path.realpath(out))
    except UnicodeEncodeError as error:
        shown = os.fsencode(out).decode(errors="backslashreplace")
        raise RefusedError(
            f"{shown}: the folder's name is not text in UTF-8, so no program could open the model by its name. Choose "
            "another output folder."
        ) from error
    except ValueError as error:  # a null byte
        raise RefusedError(f"{out}: cannot be looked up: {error}. Choose another output folder.") from error
    if os.path.islink(resolved):  # noqa: PTH114  never raises, as of a name that is too long
        raise RefusedError(f"{out}: cannot be looked up: its links form a ring. Choose another output folder.")
    return resolved


def _check_entries(
    out: Path,
    resolved: Path,
    held: Collection[Path],
    *,
    inputs: Collection[Path],
    replaceable: Replaceable | None,
    offered: bool,
) -> None:
    if replaceable is None:
        raise RefusedError(
            f"{out}: is not empty ({len(held)} entries, among them {min(e.name for e in held)!r}). "
            f"Choose another output folder, or {'replace this one with --overwrite' if offered else 'remove this one'}."
        )
    if Change.read(beside(resolved, UNDO)):
        raise RefusedError(
            f"{out}: its last edit in place can still be undone, which could not be once it is replaced. Make it final "
            f"with `moemerge edit {out} --commit`, or go back with --undo, and replace it then."
        )
    for path in inputs:
        if resolved in path.resolve().parents:
            raise RefusedError(
                f"{out}: holds {path.name!r}, which this merge reads, and --overwrite replaces the whole folder. Move "
                "it away, or choose another output folder."
            )
    allowed = replaceable(resolved)
    if allowed is None:
        raise RefusedError(
            f"{out}: holds no complete checkpoint, that is, config.json, weights and what their index names; "
            "--overwrite replaces nothing else. Choose another output folder."
        )
    foreign = foreign_files(resolved, allowed)
    if foreign:
        raise RefusedError(
            f"{out}: holds {foreign[0]!r}, which this merge does not write ({len(foreign)} such "
            f"file{'s' if len(foreign) > 1 else ''}), and --overwrite replaces the whole folder. Move it away, or "
            "choose another output folder."
        )
