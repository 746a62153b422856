"""Files of a repository on the Hub, read by byte ranges; ranges that are read again are kept on the disk.

A range is one request for a stretch of bytes (RFC 9110, section 14). An interrupted download continues where it
stopped; a busy Hub is asked again. URLs, tokens and errors are those of `huggingface_hub`; the token goes to the
Hub alone, not to the host that the Hub redirects to for the bytes.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from moemerge.checkpoint.copy import write_all, write_failure
from moemerge.checkpoint.files import Reader
from moemerge.checkpoint.own_lock import OwnLock
from moemerge.errors import SourceError
from moemerge.sources.reference import Reference
from moemerge.sources.retries import ABSENT, Patience, explained, patiently, sleep

if TYPE_CHECKING:
    from typing_extensions import Self

_log: Final = logging.getLogger(__name__)
_CHUNK_BYTES: Final = 2**17
_KEPT_BYTES: Final = 2**20
# Seconds between checks whether the reader still waits.
_NAP_SECONDS: Final = 0.25
_PARTIAL_CONTENT: Final = 206
_NOT_SATISFIABLE: Final = 416
# Status codes of the host for the bytes when the address that the Hub gave has expired.
_EXPIRED: Final = {401, 403}
_MOST_REFUSALS: Final = 3


class NoRangesError(SourceError):
    """The Hub, or a proxy before it, does not send parts of a file."""


class HubFile:
    """A file at one commit; a `moemerge.checkpoint.files.RemoteFile`."""

    def __init__(self, reference: Reference, commit: str, name: str, announce: Callable[[str], None]) -> None:
        """Look the file up.

        Raises:
            SourceError: the Hub does not give the file; says what to do.
        """
        self._reference, self._commit, self.name, self.announce = reference, commit, name, announce
        self._lock = OwnLock()
        self._spool: _Spool | None = None
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

    def __getstate__(self) -> dict[str, Any]:
        """Give what another process reads the file by: without the bytes that are kept here."""
        return {**self.__dict__, "_spool": None, "announce": _log.info}

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Keep these bytes in `folder` when they are first read."""
        if self._spool is None or self._spool.path.parent != folder:
            kept = f"{self._reference.repo}--{self._commit}--{self.name}".replace("/", "--")
            self._spool = _Spool(folder / kept)
        self._spool.want(start, start + nbytes)

    def open(self, start: int, nbytes: int) -> Reader:
        """Open the file for reading `nbytes` bytes from offset `start` on; kept bytes come from a file on the disk.

        Raises:
            OutputError: the disk is full.
            SourceError: the bytes cannot be reached, or the repository was changed; reading may raise it too.
        """
        if nbytes and self._spool and self._spool.wants(start, start + nbytes):
            return self._spool.open(self, start, start + nbytes)
        return _Range(self, start, start + nbytes)

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


class _Range:
    """A reader of a range of a file, as the bytes arrive."""

    def __init__(self, file: HubFile, start: int, end: int) -> None:
        self._file, self._next, self._end = file, start, end
        self._patience = Patience(file, file.announce)
        self._open = ExitStack()
        self._chunks: Iterator[bytes] | None = None
        self._left = memoryview(b"")
        self._again_at = 0.0
        self._refusals = 0
        """Count of refused addresses since bytes last arrived."""

    def readinto(self, view: memoryview, /) -> int | None:
        """Read what has arrived; None while the next try waits."""
        if not self._left and self._next < self._end and not self._receive():
            return None
        count = min(len(view), len(self._left))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _receive(self) -> bool:
        """Wait for a chunk; False if none has arrived."""
        wait = self._again_at - time.monotonic()
        sleep(min(max(wait, 0), _NAP_SECONDS))
        if wait > 0:
            return False
        try:
            if self._chunks is None:
                self._chunks = self._connect()
            chunk = next(self._chunks, b"")
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001  of two HTTP libraries, which have nothing in common
            return self._try_later(error)
        if not chunk:
            return self._try_later(ConnectionError(f"the answer ended {self._end - self._next} bytes too early"))
        self._patience.reset()
        self._refusals = 0
        self._left = memoryview(chunk)[: self._end - self._next]
        self._next += len(self._left)
        if self._next == self._end:
            with suppress(Exception):  # a connection is used again only when its answer was read to the end
                next(self._chunks, b"")
        return True

    def _try_later(self, error: Exception) -> Literal[False]:
        self._chunks = None
        self._open.close()
        try:
            self._again_at = time.monotonic() + self._patience.wait_after(error)
        except Exception as final:
            raise self._file.explain(final) from final
        return False

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

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


class _Spool:
    """Bytes read of a file, kept in a sparse local file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spans: dict[tuple[int, int], threading.Lock] = {}
        self._held: set[tuple[int, int]] = set()

    def want(self, start: int, end: int) -> None:
        """Mark these bytes to be kept; they are fetched together, whichever of them is read first."""
        if not any(first <= start and end <= last for first, last in self._spans):
            spans = {span: lock for span, lock in self._spans.items() if not start <= span[0] <= span[1] <= end}
            self._spans = spans | {(start, end): threading.Lock()}

    def wants(self, start: int, end: int) -> bool:
        """Whether all of these bytes are marked to be kept."""
        for first, last in sorted(self._spans):
            if first <= start < last:
                start = last
        return start >= end

    def open(self, file: HubFile, start: int, end: int) -> Reader:
        """Open the local file at `start`, once everything up to `end` is there."""
        for span, lock in sorted(self._spans.items()):
            if span[0] < end and start < span[1]:
                with lock:
                    if span not in self._held:
                        self._fetch(file, *span)
                        self._held.add(span)
        reader = self.path.open("rb", buffering=0)
        reader.seek(start)
        return reader

    def _fetch(self, file: HubFile, start: int, end: int) -> None:
        buffer = memoryview(bytearray(min(_KEPT_BYTES, end - start)))
        try:
            self.path.parent.mkdir(exist_ok=True)
            target = os.open(self.path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                os.lseek(target, start, os.SEEK_SET)
                with _Range(file, start, end) as reader:
                    while (count := reader.readinto(buffer)) != 0:
                        write_all(target, buffer[: count or 0])
            finally:
                os.close(target)
        except OSError as error:
            raise write_failure(self.path.parent.parent / self.path.name, error) from error
