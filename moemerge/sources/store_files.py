"""Models in object stores: small files are kept in the user's cache, weights are read there by byte ranges."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Final

from moemerge.checkpoint.disk import cache_folder, drafted
from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import NoSuchModelError, OutputError, RefusedError, SourceError
from moemerge.sources.range_reader import RangedFile, RangeReader
from moemerge.sources.reference import Location
from moemerge.sources.remote_weights import SMALL_FILES, TEMPLATES, choose_files, tensors_of
from moemerge.sources.retries import Patience
from moemerge.sources.stores import StoreFolder, explained, may_pass

COMPLETE: Final = "moemerge-complete.json"
"""Name of the object that is written last into a folder of a store: it lists the others."""
UNFINISHED: Final = "moemerge-unfinished.json"
"""Name of the object that says what a merge into a folder of a store has sent, until it is complete."""
# One request each; smaller ones wait more often for the first byte.
_REQUEST_BYTES: Final = 8 * 2**20


class StoreFile(RangedFile):
    """A file of a store's folder, as it was listed."""

    def __init__(self, folder: StoreFolder, name: str, announce: Callable[[str], None]) -> None:
        stored = folder.files[name]
        self.folder, self.nbytes, self.identity = folder, stored.nbytes, stored.identity
        super().__init__(name, hashlib.sha256(repr((str(folder), name, stored)).encode()).hexdigest(), announce)

    def __repr__(self) -> str:
        return f"{self.folder}/{self.name}"

    def range(self, start: int, end: int) -> RangeReader:
        """A reader of the bytes from `start` up to `end`, which come from the store."""
        return _StoreRange(self, start, end)

    def patience(self) -> Patience:
        """How often reading of a range is tried again."""
        return Patience(self, self.announce, may_pass=may_pass)

    def explain(self, error: Exception) -> SourceError:
        """The error for reading that failed for good."""
        try:
            if self.folder.first_changed([self.name]):
                return self.folder.changed(self.name)
            with explained(self.folder.location):
                raise error
        except SourceError as failure:
            return failure


class _StoreRange(RangeReader):
    """A reader of a range of a file in a store, some megabytes by each request."""

    def __init__(self, file: StoreFile, start: int, end: int) -> None:
        super().__init__(file, start, end)
        self._file = file

    def _connect(self) -> Iterator[bytes]:
        opened = self._open.enter_context(self._file.folder.open(self._file.name))
        opened.seek(self._next)
        return iter(lambda: opened.read(min(_REQUEST_BYTES, self._end - self._next)), b"")


def fetch_small_files(location: Location, *, also: Sequence[str] = ()) -> tuple[StoreFolder, Path]:
    """Copy everything but the weights into the user's cache; returns the folder as it was listed, and that of the copy.

    The copy's name changes with the content of the folder, so what is in it is of one state.

    Args:
        location: the folder of the store.
        also: names of other files to copy.

    Raises:
        SourceError: the folder cannot be reached, is empty or unfinished, or was changed meanwhile.
        RefusedError: a package is needed, or there is no folder for the copy.
        OutputError: the copy cannot be written.
    """
    folder = StoreFolder(location)
    if not folder.files:
        raise NoSuchModelError(f"{location}: there is nothing in the store at this address. Check the name.")
    if UNFINISHED in folder.files and COMPLETE not in folder.files:
        raise SourceError(
            f"{location}: holds a merge that was cut off before it was complete. The command that made it, with "
            "--resume, continues it."
        )
    patterns = (*SMALL_FILES, f"{TEMPLATES}/*.jinja", CONFIG_COPY, *also)
    fetch(
        folder, here := _copy_of(folder), [name for name in folder.files if any(map(partial(fnmatch, name), patterns))]
    )
    return folder, here


def fetch(folder: StoreFolder, here: Path, names: Sequence[str]) -> None:
    """Copy those of the named files that the folder has into its copy `here`.

    Raises:
        SourceError: they cannot be reached, or were changed meanwhile.
        OutputError: they cannot be written.
    """
    missing = [name for name in names if name in folder.files and not (here / name).is_file()]
    contents = {}
    with explained(folder.location):
        for name in missing:
            with folder.open(name) as opened:
                contents[name] = opened.read()
    if missing and (changed := folder.first_changed(missing)):
        raise folder.changed(changed)
    try:
        here.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (here / name).parent.mkdir(exist_ok=True)
            with drafted(here / name) as draft:
                draft.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{here}: cannot be written ({error.strerror or error}).") from error


def read_store_tensors(
    folder: StoreFolder, here: Path, announce: Callable[[str], None]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Read the table of a model's tensors from headers by byte ranges, with notes on what is odd.

    Args:
        folder: the model's folder.
        here: the copy of its small files.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: the weights cannot be reached, are not there, or are pickles.
        CheckpointError: index and headers disagree, or a file is damaged.
    """
    names = choose_files(str(folder), here, folder.files)
    if names[0].endswith(".bin"):
        raise SourceError(
            f"{folder}: its weights are pickles ({names[0]}), which cannot be read by ranges. Copy the folder "
            "here, and name the copy."
        )
    announce(f"{folder}: reading the headers of {len(names)} file(s)")
    return tensors_of(here, names, lambda name: StoreFile(folder, name, announce))


def _copy_of(folder: StoreFolder) -> Path:
    cache = cache_folder("stores")
    if cache is None:
        raise RefusedError(
            f"{folder}: its small files are copied into a folder of your cache, and you have none. Set XDG_CACHE_HOME "
            "to a folder."
        )
    state = repr((str(folder), sorted(folder.files.items())))
    return cache / f"{folder.location.path.rpartition('/')[2][:80]}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
