"""What was asked of a Hub and what went over the wire."""

from collections import Counter
from dataclasses import dataclass
from threading import RLock
from typing import NamedTuple


class Request(NamedTuple):
    """A request for a file."""

    method: str
    repo: str
    path: str
    start: int
    """First byte that was asked for."""
    end: int | None = None
    """The byte after the last that was asked for, where there is such a file."""


@dataclass
class Call:
    """Any request."""

    method: str
    host: str
    """hub, cdn or uploads."""
    path: str
    """Without the query, and without `%` escapes."""
    has_token: bool
    status: int = 0
    """Of the answer; 0 while there is none."""


class Counters:
    """Counts, all of which grow before the caller can know of the end of its request."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.calls: list[Call] = []
        self.sent: Counter[tuple[str, str]] = Counter()
        """Bytes of each repository's file that were sent."""
        self.received: Counter[str] = Counter()
        """Bytes of each LFS object, by its SHA-256, that arrived in uploads, those that broke off included."""
        self.connections: Counter[str] = Counter()
        """To each host."""
        self.lock = RLock()

    def requested(self, repo: str) -> set[str]:
        """The files of a repository that were asked for in any way."""
        return {request.path for request in self.requests if request.repo == repo}

    def downloaded(self, repo: str) -> list[str]:
        """The files of a repository whose bytes were sent, once for each time."""
        return sorted(request.path for request in self.requests if request.repo == repo and request.method == "GET")

    def ranges(self, repo: str, path: str) -> list[tuple[int, int | None]]:
        """The ranges of a file that were asked for, in their order."""
        asked = [request for request in self.requests if (request.repo, request.path) == (repo, path)]
        return [(request.start, request.end) for request in asked if request.method == "GET"]

    def sent_bytes(self, repo: str = "", suffix: str = "") -> int:
        """Bytes of files that were sent, of one repository or of all."""
        counts = dict(self.sent).items()
        return sum(n for (name, path), n in counts if repo in {"", name} and path.endswith(suffix))

    def received_bytes(self, sha256: str = "") -> int:
        """Bytes that arrived in uploads of LFS objects, of one or of all."""
        return self.received[sha256] if sha256 else self.received.total()

    def reset(self) -> None:
        """Begin to count anew."""
        with self.lock:
            for counts in (self.requests, self.calls, self.sent, self.received, self.connections):
                counts.clear()

    def count_connection(self, host: str) -> None:
        with self.lock:
            self.connections[host] += 1

    def count_sent(self, repo: str, path: str, count: int) -> None:
        with self.lock:
            self.sent[repo, path] += count

    def count_received(self, sha256: str, count: int) -> int:
        """Count, and give what has arrived in all."""
        with self.lock:
            self.received[sha256] += count
            return self.received.total()
