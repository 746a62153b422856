"""Files of a repository on the Hub, read by byte ranges.

A range is one request for a stretch of bytes (RFC 9110, section 14). URLs, tokens and errors are those of
`huggingface_hub`; the token goes to the Hub alone, not to the host that the Hub redirects to for the bytes.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from moemerge.checkpoint.own_lock import OwnLock
from moemerge.errors import SourceError
from moemerge.sources.range_reader import RangedFile, RangeReader
from moemerge.sources.reference import Reference
from moemerge.sources.retries import ABSENT, explained, patiently

_CHUNK_BYTES: Final = 2**17
_PARTIAL_CONTENT: Final = 206
_NOT_SATISFIABLE: Final = 416
# Status codes of the host for the bytes when the address that the Hub gave has expired.
_EXPIRED: Final = {401, 403}
_MOST_REFUSALS: Final = 3


class NoRangesError(SourceError):
    """The Hub, or a proxy before it, does not send parts of a file."""


class HubFile(RangedFile):
    """A file at one commit."""

    def __init__(self, reference: Reference, commit: str, name: str, announce: Callable[[str], None]) -> None:
        """Look the file up.

        Raises:
            SourceError: the Hub does not give the file; says what to do.
        """
        super().__init__(name, f"{reference.repo}--{commit}--{name}".replace("/", "--"), announce)
        self._reference, self._commit = reference, commit
        self._lock = OwnLock()
        self._url = hf_hub_url(reference.repo, name, revision=commit)
        self._location: str | None = None
        self._tags: dict[str, str] = {}
        with explained(reference, ABSENT):
            found = patiently(self, announce, lambda: get_hf_file_metadata(self._url))
        if found.size is None or found.etag is None:
            raise NoRangesError(f"{self}: the Hub tells neither size nor hash of it, so it cannot be streamed.")
        self.nbytes, self.identity, self._location = found.size, found.etag, found.location

    def __repr__(self) -> str:
        return f"{self._reference.repo}@{self._commit[:7]}/{self.name}"

    def range(self, start: int, end: int) -> RangeReader:
        """A reader of the bytes from `start` up to `end`, which come from the Hub."""
        return _HubRange(self, start, end)

    def locate(self) -> str:
        """The address of the file's bytes."""
        with self._lock:
            if self._location is None:
                self._location = self._locate_again()
            return self._location

    def forget_location(self, location: str) -> None:
        """Look the address up again next time, since this one was refused."""
        with self._lock:
            self._location = None if self._location == location else self._location

    def _locate_again(self) -> str:
        try:
            found = get_hf_file_metadata(self._url)
        except (RevisionNotFoundError, EntryNotFoundError) as error:
            raise self._changed("it is no longer there") from error
        if found.etag != self.identity or found.size != self.nbytes or found.commit_hash not in {self._commit, None}:
            raise self._changed("it has other content now")
        return found.location

    def check_answer(self, location: str, answer: Any, start: int, end: int) -> None:
        """Check that an answer is the range that was asked for, of the same content as the ranges before.

        Raises:
            SourceError: the answer is something else.
        """
        status, headers = answer.status_code, answer.headers
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        if status != _PARTIAL_CONTENT or not found:
            raise NoRangesError(
                f"{self}: bytes {start} to {end} were asked for, but {urlsplit(location).netloc} sends no byte ranges "
                f"(status {status}). Run without --stream."
            )
        first, last = int(found[1]), int(found[2])
        if found[3] not in {str(self.nbytes), "*"}:
            raise self._changed(f"it had {self.nbytes} bytes and has {found[3]}")
        place = urlsplit(location)
        if (tag := headers.get("ETag")) and self._tags.setdefault(place.netloc + place.path, tag) != tag:
            raise self._changed("it has other content now")
        if first != start or last >= end:
            raise SourceError(f"{self}: bytes {start} to {end} were asked for, {first} to {last + 1} were sent.")

    def refused(self, location: str, status: int) -> SourceError:
        """The error for a host that refuses even a fresh address."""
        return SourceError(
            f"{self}: {urlsplit(location).netloc}, where the Hub sends us for the bytes, refuses them (status "
            f"{status}). Check what stands between you and it: a proxy, a firewall, the clock."
        )

    def _changed(self, how: str) -> SourceError:
        return SourceError(
            f"{self}: the repository was changed while it was read: {how}. Run it again, which starts from the new "
            "commit, or name a revision that stays."
        )

    def explain(self, error: Exception) -> SourceError:
        """The error for reading that failed for good."""
        if isinstance(error, SourceError):
            return error
        try:
            with explained(self._reference, "the Hub cannot be reached any more. Check the network."):
                raise error
        except SourceError as failure:
            return failure


class _HubRange(RangeReader):
    """A reader of a range of a file on the Hub."""

    def __init__(self, file: HubFile, start: int, end: int) -> None:
        super().__init__(file, start, end)
        self._file = file
        self._refusals = 0
        """Count of refused addresses since bytes last arrived."""

    def _receive(self) -> bool:
        arrived = super()._receive()
        if arrived:
            self._refusals = 0
        return arrived

    def _connect(self) -> Iterator[bytes]:
        location = self._file.locate()
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={self._next}-{self._end - 1}"}
        if at_hub := urlsplit(location)[:2] == urlsplit(constants.ENDPOINT)[:2]:
            headers |= build_hf_headers()
        session: Any = get_session()
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        if isinstance(session.stream, bool):  # a session of requests, in huggingface_hub before 1.0
            answer = self._open.enter_context(session.get(location, headers=headers, stream=True, timeout=timeout))
            # Bytes that have arrived are wanted even if no more come, which only newer versions of urllib3 give.
            read, most = (answer.raw.read1, _CHUNK_BYTES) if hasattr(answer.raw, "read1") else (answer.raw.read, 2**14)
            chunks: Iterator[bytes] = iter(lambda: read(most), b"")
        else:
            answer = self._open.enter_context(session.stream("GET", location, headers=headers, timeout=timeout))
            chunks = answer.iter_raw()
        if not at_hub and answer.status_code in _EXPIRED:
            self._refusals += 1
            if self._refusals > _MOST_REFUSALS:
                raise self._file.refused(location, answer.status_code)
            self._file.forget_location(location)
            raise ConnectionError("the address of the bytes has expired")
        if answer.status_code != _NOT_SATISFIABLE:  # else of another size
            hf_raise_for_status(answer)
        self._file.check_answer(location, answer, self._next, self._end)
        return chunks
