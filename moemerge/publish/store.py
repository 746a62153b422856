"""Send a merged model to an object store, shard by shard while it is made; an object that lists all comes last."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.output_folder import nothing_to_resume
from moemerge.config.schema import CARD, CONFIG_COPY
from moemerge.errors import OutputError, RefusedError
from moemerge.planning.tokenizer_files import COPIED_FILES, template_names
from moemerge.publish.folder import name_in_repository
from moemerge.publish.store_note import StoreNote
from moemerge.sources.model_folder import Announce, ModelFolder
from moemerge.sources.reference import Location
from moemerge.sources.remote_weights import TEMPLATES
from moemerge.sources.retries import Patience, Result
from moemerge.sources.store_files import COMPLETE, UNFINISHED
from moemerge.sources.stores import PART_BYTES, PARTS_AT_ONCE, Stored, StoreFolder, explained, may_pass

# Without these no reader takes a folder for a model, so they come last and go first.
_SEALS: Final = ("config.json", SAFETENSORS_INDEX)
# What a merge writes, where it is not known yet which of them.
_OURS: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_TEMPLATE: Final = re.compile(rf"{TEMPLATES}/[^/]+\.jinja")
_OTHERS: Final = frozenset({*COPIED_FILES, *_SEALS, CARD, CONFIG_COPY, COMPLETE, UNFINISHED})
_PARTS: Final[Mapping[str, Mapping[str, int]]] = {"s3": {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}}
_READ_BYTES: Final = 2**20


@dataclass(frozen=True)
class Sent:
    """An object that was sent."""

    bytes: int
    sha256: str
    identity: str
    """What the store says of its state."""


class StoreOutput:
    """A folder of an object store that one merge is sent to."""

    def __init__(self, location: Location, announce: Announce) -> None:
        """List the folder, and read what an unfinished merge has noted there.

        Raises:
            RefusedError: the address is that of a GGUF file, or a package is needed.
            SourceError, OutputError: the store cannot be reached, or refuses.
        """
        if location.gguf:
            raise RefusedError(f"{location}: a GGUF file is written on this machine. Name a file here, and copy it.")
        self.location, self._announce = location, announce
        self.began = False
        """Whether this merge has removed what was there, to send its own."""
        self.look()

    def look(self) -> None:
        """List the folder anew, since another merge may have ended there meanwhile.

        Raises:
            SourceError, OutputError: the store cannot be reached, or refuses.
        """
        self._folder = StoreFolder(self.location)
        self._note = self._ask(lambda: StoreNote(self._folder))
        self._sent: dict[str, Sent] = {}
        self.journal = ""
        """The journal of an unfinished merge that was sent here."""
        noted = self._note.found or {}
        with suppress(TypeError, KeyError, AttributeError):  # one that was damaged is as good as none
            self._sent = {name: Sent(**values) for name, values in noted["objects"].items()}
            self.journal = str(noted["journal"])

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.location.path.rpartition("/")[2]

    @property
    def shards(self) -> int:
        """The number of shards that an unfinished merge has sent."""
        return sum(_OURS.fullmatch(name) is not None for name in self._sent)

    def check(
        self,
        sources: Iterable[ModelFolder],
        *,
        overwrite: bool,
        resume: bool = False,
        written: Collection[str] = (),
    ) -> None:
        """Refuse a folder in which something would be lost; changes nothing.

        What an unfinished merge has sent may be replaced. Other objects may be only with `overwrite`, and only those
        that a merge writes.

        Args:
            sources: the models that are read.
            overwrite: whether a model that is there may be replaced.
            resume: whether an unfinished merge is expected there.
            written: names of the files that the merge will write, as far as they are known.

        Raises:
            RefusedError: something would be lost.
        """
        for source in sources:
            if any(_overlap(place, self.location) for place in _places_of(source)):
                raise RefusedError(
                    f"{self.location}: is, holds or lies within the model {source.origin}. Choose another address."
                )
        names = [name for name in self._folder.files if name != UNFINISHED]
        if not names:
            return
        if resume and not overwrite and COMPLETE in names:
            raise nothing_to_resume(self.location)
        if not (self._is_unfinished or overwrite):
            raise RefusedError(
                f"{self.location}: is not empty ({len(names)} objects, among them {min(names)!r}). Choose another "
                "address, or replace what is there with --overwrite."
            )
        allowed = {*_OTHERS, *self._sent, *written}
        foreign = [n for n in names if n not in allowed and not _OURS.fullmatch(n) and not _TEMPLATE.fullmatch(n)]
        if foreign:
            raise RefusedError(
                f"{self.location}: holds {foreign[0]!r}, which this merge does not write ({len(foreign)} such "
                "objects). Move it away, or choose another address."
            )

    def held(self) -> Mapping[str, tuple[str, int]]:
        """SHA-256 and size of each shard of an unfinished merge that is still as it was sent, by name."""
        files = self._folder.files
        whole = {n: sent for n, sent in self._sent.items() if n in files and files[n].identity == sent.identity}
        return {name: (sent.sha256, sent.bytes) for name, sent in whole.items() if files[name].nbytes == sent.bytes}

    @property
    def _is_unfinished(self) -> bool:
        """Whether a merge has begun here, and none was completed."""
        return self._note.found is not None and COMPLETE not in self._folder.files

    def announce_unfinished(self) -> None:
        """Say that an unfinished merge is here, which may be under way elsewhere."""
        if self._is_unfinished:
            self._announce(
                f"{self.location}: holds an unfinished merge, which this one replaces. If it still runs on another "
                "machine, stop this command now."
            )

    def claim(self) -> None:
        """Note that a merge begins here, and so make sure that the store takes it, unless a model is here to be kept.

        The note of an unfinished merge stays until this one begins to send: if it is still under way elsewhere, it may
        be complete by then. Whether the store takes anything shows later then.

        Raises:
            BusyError: another merge has begun here meanwhile.
            OutputError: the store does not take it.
        """
        if self._note.found is not None:
            self._ask(self._note.check)
        elif COMPLETE in self._folder.files or "config.json" not in self._folder.files:
            self._ask(lambda: self._note.put(self._noted(self.journal)))

    def begin(self, journal: str, kept: Collection[str]) -> None:
        """Note that a merge has begun here, and remove all that is not kept: `config.json` and the index first.

        Args:
            journal: the merge's journal.
            kept: names of the shards that an unfinished run of it has sent.

        Raises:
            BusyError: another merge has begun here meanwhile.
            OutputError: the store does not take it.
            RefusedError: the folder has changed since it was checked, and not by this merge.
        """
        seen, now = self._folder.files, self._list_again()
        if changed := [name for name in now if name != UNFINISHED and now[name] != seen.get(name)]:
            raise RefusedError(
                f"{self.location}/{changed[0]}: is new, or was changed, since this merge began. Look who else writes "
                "there, and merge again."
            )
        self._sent, self.began = {name: self._sent[name] for name in kept}, True
        self.note(journal)
        gone = [name for name in now if name not in kept and name != UNFINISHED]
        for name in sorted(gone, key=lambda name: (name != COMPLETE, name not in _SEALS)):
            self._ask(lambda name=name: self._folder.store.rm_file(self._folder.path_of(name)))  # type: ignore[misc]

    def note(self, journal: str) -> None:
        """Keep a merge's journal here until it is complete.

        Raises:
            BusyError: another merge has begun here meanwhile.
            OutputError: the store does not take it.
        """
        self._ask(lambda: self._note.put(self._noted(journal)))

    def _noted(self, journal: str) -> Mapping[str, Any]:
        return {"journal": journal, "objects": {name: asdict(sent) for name, sent in self._sent.items()}}

    def send(self, path: Path, name: str | None = None) -> str:
        """Send a file, in parts where it is large; returns its SHA-256.

        Raises:
            BusyError: another merge has begun here meanwhile.
            OutputError: the store does not take it, or has another size of it than was sent.
        """
        name = name or path.name
        sha256, nbytes, place = _sha256(path), path.stat().st_size, self._folder.path_of(name)
        parts = _PARTS.get(self.location.kind, {})

        def send() -> None:
            self._note.check()  # at each try, since it may replace what the other merge has sent
            self._folder.store.put_file(str(path), place, **parts)

        self._ask(send)
        found = self._list_again().get(name)
        if found is None or found.nbytes != nbytes:
            raise OutputError(
                f"{self.location}/{name}: {nbytes} bytes were sent, and the store holds "
                f"{'nothing' if found is None else found.nbytes}. Run it again with --resume."
            )
        self._sent[name] = Sent(nbytes, sha256, found.identity)
        return sha256

    def finish(self, folder: Path) -> None:
        """Send what is left in the folder, `config.json` last, then the object that makes the model complete.

        Raises:
            BusyError: another merge has begun here meanwhile.
            OutputError: the store does not take it, or a shard is no longer as it was sent.
        """
        self._check_sent()
        paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        paths += [folder / name for name in template_names(folder)]
        for path in sorted(paths, key=lambda path: (path.name in _SEALS, path.name == "config.json")):
            self.send(path, name_in_repository(path))
        files = {name: {"bytes": sent.bytes, "sha256": sent.sha256} for name, sent in sorted(self._sent.items())}
        text = json.dumps({"moemerge": version("moemerge"), "files": files}, indent=2) + "\n"
        self._check_sent()
        self._ask(lambda: self._folder.store.pipe_file(self._folder.path_of(COMPLETE), text.encode()))
        self._note.remove()  # beside a complete model it means nothing

    def _check_sent(self) -> None:
        """Refuse to go on where another merge writes, or anything is there that this one has not sent."""
        now = self._list_again()
        self._ask(self._note.check)  # the last before the next object is sent
        wrong = [name for name, sent in self._sent.items() if name not in now or now[name].identity != sent.identity]
        wrong += [name for name in now if name not in self._sent and name != UNFINISHED]
        if wrong:
            raise OutputError(
                f"{self.location}/{wrong[0]}: is not, or no longer, what this merge has sent. Look who else writes "
                "there, and run the same command with --resume: it sends what is missing."
            )

    def give_up(self) -> None:
        """Remove the note that this merge has begun, where it has sent nothing; whatever fails."""
        if not self._sent and self._note.found is None:
            self._note.remove()

    def _list_again(self) -> Mapping[str, Stored]:
        return self._ask(self._folder.list_again)

    def _ask(self, action: Callable[[], Result]) -> Result:
        """Ask the store again if it is too busy or fails."""
        with explained(self.location, OutputError):
            return Patience(self.location, self._announce, may_pass=may_pass).repeat(action)


def _places_of(source: ModelFolder) -> Iterator[Location]:
    """The folders that a model is read from; one on this machine may also be written as a store, by `file://`."""
    if isinstance(source.origin, StoreFolder):
        yield source.origin.location
    yield from (Location("file", str(folder)) for folder in source.folders)


def _overlap(one: Location, other: Location) -> bool:
    first, second = (
        f"{place.kind}://{os.path.realpath(place.path) if place.kind == 'file' else place.path}/"
        for place in (one, other)
    )
    return first.startswith(second) or second.startswith(first)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            found.update(chunk)
    return found.hexdigest()
