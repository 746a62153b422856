"""The object by which a merge into a folder of an object store says that it is under way, and what it has sent."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final
from uuid import uuid4

from moemerge.errors import BusyError
from moemerge.sources.store_files import UNFINISHED
from moemerge.sources.stores import StoreFolder, may_pass

_MERGE: Final = "merge"


class StoreNote:
    """The note of one merge. Of two merges into one folder only one has its note there; the other one stops.

    Errors of the store's libraries are raised as they come; each method may then be called again.
    """

    def __init__(self, folder: StoreFolder) -> None:
        """Read the note that is in a folder, which was just listed."""
        self._folder, self._store, self._path = folder, folder.store, folder.path_of(UNFINISHED)
        self._id, self._is_put = uuid4().hex, False
        self._found = self._read() if UNFINISHED in folder.files else None

    @property
    def found(self) -> Mapping[str, Any] | None:
        """What an unfinished merge has noted, `journal` and `objects`; None where there was no note."""
        return None if self._found is None else _parsed(self._found)

    def put(self, content: Mapping[str, Any]) -> None:
        """Put this merge's note, in the place of the one that was there when the folder was listed.

        Where there was none, the store is asked to take it only if there still is none, as S3 and Google's store can.

        Raises:
            BusyError: another merge has put its note meanwhile.
        """
        text = json.dumps({_MERGE: self._id, **content}, indent=2).encode() + b"\n"
        if self._found is None and not self._is_put:
            self._create(text)
        if self.check() != text:
            self._store.pipe_file(self._path, text)
            self._is_put = True

    def check(self) -> bytes | None:
        """Make sure that no other merge has put its note since the folder was listed; returns what is there.

        Raises:
            BusyError: another one has.
        """
        now = self._read()
        if self._is_ours(now):
            self._is_put = True
        elif self._is_put or now != self._found:
            raise BusyError(
                f"{self._folder}: another merge has begun to write there, so this one stops, and leaves everything as "
                "it is. Wait for the other one to end and check it with `moemerge verify`, or choose another address."
            )
        return now

    def remove(self) -> None:
        """Remove the note if it is this merge's, whatever fails."""
        with suppress(Exception):
            if self._is_ours(self._read()):
                self._store.rm_file(self._path)

    def _create(self, text: bytes) -> None:
        try:
            self._store.pipe_file(self._path, text, mode="create")
        except Exception as error:  # of several libraries; what is there afterwards tells what happened
            if may_pass(error) or isinstance(error, PermissionError):
                raise

    def _read(self) -> bytes | None:
        try:
            content: bytes = self._store.cat_file(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def _is_ours(self, content: bytes | None) -> bool:
        return content is not None and _parsed(content).get(_MERGE) == self._id


def _parsed(content: bytes) -> Mapping[str, Any]:
    """What a note says; nothing of one that was damaged."""
    with suppress(ValueError):
        noted = json.loads(content)
        return noted if isinstance(noted, dict) else {}
    return {}
