"""The folder of `--keep-states`: the names of its files, and what killed merges have left in it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from moemerge.config.router_methods import RouterMethod
from moemerge.errors import RefusedError
from moemerge.sources.reference import location_of

_LOCK: Final = ".lock"
_FILE: Final = re.compile(r"[0-9a-f]{32}\.safetensors")
# A file that is being written, with the number of the process that writes it.
_DRAFT: Final = re.compile(r"\.[0-9a-f]{32}\.safetensors\.\d+")


def path_of(folder: Path, key: str) -> Path:
    """The path of the file for a key, of which the first 32 hexadecimal digits are its name."""
    return folder / f"{key[:32]}.safetensors"


def draft_of(path: Path) -> Path:
    """The path that this process writes a file to, until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextmanager
def without_old_drafts(folder: Path) -> Iterator[None]:
    """A context for writing into the folder; drafts of killed merges are removed, if no other merge is writing."""
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # another merge is writing; or what cannot be written is said by what writes
        yield
        return
    try:
        for path in folder.iterdir():
            if _DRAFT.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()
        yield
    finally:
        with suppress(OSError):
            (folder / _LOCK).unlink()
        lock.release()


def check_kept_states(folder: Path, out: Path | None = None) -> None:
    """Refuse a folder for router inputs that holds anything else, or is in the output; an absent one is made.

    Raises:
        RefusedError: it is no folder, cannot be made, holds other files, or is in `out`.
    """
    if place := location_of(folder):
        raise RefusedError(f"--keep-states: {place} is in an object store. Name a folder on this machine.")
    if out and out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise RefusedError(f"--keep-states: {folder} is in the output, {out}. Name a folder elsewhere.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    except OSError as error:
        raise RefusedError(f"--keep-states: {folder} cannot be made a folder: {error.strerror}.") from error
    if others:
        raise RefusedError(
            f"--keep-states: {folder} holds {others[0]!r}, which is no file of router inputs. Name a new or empty "
            "folder, or one that an earlier merge has kept them in."
        )


def check_keeps(method: RouterMethod, *, runs_base: bool) -> None:
    """Refuse to keep router inputs for a merge that makes none that could be kept.

    Args:
        method: the method of the merge.
        runs_base: whether the prompts pass through the base model.

    Raises:
        RefusedError: the base model is not run, or other states of it are read.
    """
    if not runs_base:
        raise RefusedError(
            f"--keep-states: gate_mode {method.name} does not run the base model, so there are no router inputs to "
            "keep. Leave the option out, or choose another gate_mode."
        )
    if method.like_mergekit:
        raise RefusedError(
            f"--keep-states: gate_mode {method.name} reads other states than those that are kept. Leave the option "
            "out, or choose another gate_mode."
        )


def _is_ours(name: str) -> bool:
    return name == _LOCK or bool(_FILE.fullmatch(name) or _DRAFT.fullmatch(name))
