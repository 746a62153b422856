"""A Hub: what it serves, what was asked of it, and what is to go wrong."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote

from tests.support.hub_server.answer import AnswerError
from tests.support.hub_server.counting import Counters
from tests.support.hub_server.faults import Fault, Faults, Wrong
from tests.support.hub_server.serving import Handler
from tests.support.hub_server.state import IN_LFS, Blob, Content, Files, Repository, User, folder_files
from tests.support.hub_server.storage import CdnHandler, Incoming, UploadsHandler
from tests.support.hub_server.writing import HubHandler

PAGE_ENTRIES = 1000
MEGABYTE = 1_000_000
HANDLERS: dict[str, type[Handler]] = {"hub": HubHandler, "cdn": CdnHandler, "uploads": UploadsHandler}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Hub(Counters):
    """A Hub on this machine."""

    def __init__(self, store: Path | None = None) -> None:
        super().__init__()
        self.store = store
        """Where uploads are kept; None keeps them in memory."""
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, set[str]] = {}
        """Of users of whom nothing else matters, the gated repositories whose terms were accepted."""
        self.users: dict[str, User] = {}
        """By their tokens."""
        self.page_entries = PAGE_ENTRIES
        self.multipart_above = 5000 * MEGABYTE
        """Larger objects are uploaded in parts."""
        self.part_size = 20 * MEGABYTE
        self.regular_up_to = 10 * MEGABYTE
        """Larger files are in LFS, whatever their names."""
        self.storage_limits: dict[str, int] = {}
        """Bytes that the repositories of a namespace may have in LFS together."""
        self.trusts_uploads = False
        """Whether uploads are taken for what they are said to be, which saves hashing gigabytes."""
        self.breaks_off: set[str] = set()
        """Files whose first download ends in the middle."""
        self.corrupts_uploads = 0
        """How many of the next uploads arrive with a wrong byte."""
        self.uploads_end_after: int | None = None
        """When this many bytes have arrived in uploads, that host hangs up and refuses connections."""
        self.incoming: dict[str, Incoming] = {}
        self.faults = Faults()
        self.url = self.cdn_url = self.uploads_url = ""
        self._servers: dict[str, Server] = {}
        self._generation = 0

    def add(
        self,
        repo: str,
        files: Files,
        revision: str = "main",
        *,
        gated: bool | str = False,
        private: bool = False,
        status: int = 200,
        hashed: bool = True,
    ) -> None:
        """Push a branch with these files alone; the repository is created with the first.

        What is not hashed, which saves reading terabytes, is in LFS under a made-up SHA-256.
        """
        created = Repository(repo, gated=gated, status=status, private=private)
        repository = self.repositories.setdefault(repo, created)
        blobs = {path: Blob(content, path.endswith(IN_LFS)) for path, content in files.items()}
        if not hashed:
            for path, blob in blobs.items():
                blob.__dict__["sha256"] = hashlib.sha256(f"{repo} {path} {blob.size}".encode()).hexdigest()
        repository.push(revision, blobs, repository.refs.get(revision))

    def add_folder(self, repo: str, folder: Path, revision: str = "main", *, hashed: bool = True) -> None:
        """Push a branch with the files of a folder, which are read from there."""
        self.add(repo, folder_files(folder), revision, hashed=hashed)

    def remove(self, repo: str) -> None:
        """Take a repository away, and what of it is in the store."""
        with self.lock:
            for blob in self.repositories.pop(repo).objects.values():
                if self.store and isinstance(blob.content, Path) and self.store in blob.content.parents:
                    blob.content.unlink()

    def rewrite(self, repo: str, files: Files, revision: str = "main") -> None:
        """Force-push: the branch begins anew, and commits that only it led to are gone."""
        with self.lock:
            self.repositories[repo].drop(revision)
            self.add(repo, files, revision)

    def replace(self, repo: str, path: str, content: Content, revision: str = "main") -> None:
        """Let the same commit answer with another content of a file, which no Hub should."""
        repository = self.repositories[repo]
        blob = Blob(content, repository.commit(revision).blobs[path].in_lfs)
        repository.commit(revision).blobs[path] = repository.objects[blob.sha256] = blob

    def fail(
        self,
        pattern: str,
        status: int = 503,
        times: int = 1,
        *,
        method: str = "*",
        host: str = "*",
        code: str = "",
        message: str = "Told to fail",
        **headers: str,
    ) -> None:
        """Answer the next requests to paths that match with an error."""
        error = AnswerError(status, code, message, **headers)
        self._expect(Fault(pattern, times, method, host, error=error))

    def limit_rate(self, pattern: str, retry_after: int | None = None, times: int = 1, *, method: str = "*") -> None:
        """Answer the next requests to paths that match with 429."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        message = "We had to rate limit you, you hit the quota of 1000 api requests per 5 minutes period."
        self.fail(pattern, 429, times, method=method, message=message, **headers)

    def break_off(self, pattern: str, times: int = 1, *, after: int | None = None) -> None:
        """End the next downloads of files that match after some bytes, or in the middle."""
        self._expect(Fault(pattern, times, "GET", cut=True, cut_after=after))

    def misanswer(self, pattern: str, wrong: Wrong, times: int = 1) -> None:
        """Answer the next downloads of files that match with other bytes than were asked for."""
        self._expect(Fault(pattern, times, "GET", wrong=wrong))

    def before(self, pattern: str, action: Callable[[], object], times: int = 1, *, method: str = "*") -> None:
        """Call something before the next requests to paths that match are answered."""
        self._expect(Fault(pattern, times, method, action=action))

    def _expect(self, fault: Fault) -> None:
        with self.faults.lock:
            self.faults.waiting.append(fault)

    def forget_faults(self) -> None:
        """Nothing more goes wrong."""
        with self.faults.lock:
            self.faults.waiting.clear()
        self.corrupts_uploads = 0
        self.breaks_off.clear()
        self.storage_limits.clear()
        self.accept_uploads()

    def expire_locations(self) -> None:
        """Let the signatures of all addresses on the other hosts that were given out expire."""
        self._generation += 1

    def sign(self, path: str) -> str:
        """The signature that a path on another host is answered with."""
        return hashlib.sha256(f"{self._generation} {path}".encode()).hexdigest()[:32]

    def locate(self, repo: str, blob: Blob, path: str) -> str:
        """The signed address of a file on the CDN."""
        place = f"/{quote(repo, safe='')}/{blob.sha256}/{quote(path)}"
        expires = int(time.time()) + 3600
        return f"{self.cdn_url}{place}?Expires={expires}&Signature={self.sign(place)}&Key-Pair-Id=TESTS"

    def locate_upload(self, incoming: Incoming, part: int | None = None) -> str:
        """The signed address for an object or for a part of it."""
        place = f"/{quote(incoming.repo, safe='')}/{incoming.sha256}/{incoming.name}" + (f"/{part}" if part else "")
        return f"{self.uploads_url}{place}?X-Amz-Expires=3600&X-Amz-Signature={self.sign(place)}"

    def find_user(self, token: str) -> User | None:
        if token in self.tokens:
            return User("user", role="read", accepted=self.tokens[token])
        return self.users.get(token)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve while the block runs; gives the address for `HF_ENDPOINT`."""
        self.url, self.cdn_url, self.uploads_url = map(self._listen, ("hub", "cdn", "uploads"))
        try:
            yield self.url
        finally:
            for host in list(self._servers):
                self._hang_up(host)

    @property
    def takes_uploads(self) -> bool:
        return "uploads" in self._servers

    def refuse_uploads(self) -> None:
        """Refuse connections to the host of uploads."""
        self._hang_up("uploads")

    def accept_uploads(self) -> None:
        """Listen for uploads again, at the same address."""
        self.uploads_end_after = None
        if self._servers and not self.takes_uploads:
            self._listen("uploads", int(self.uploads_url.rpartition(":")[2]))

    def _listen(self, host: str, port: int = 0) -> str:
        server = self._servers[host] = Server(("127.0.0.1", port), partial(HANDLERS[host], self))
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    def _hang_up(self, host: str) -> None:
        with self.lock:
            server = self._servers.pop(host, None)
        if server:
            server.shutdown()
            server.server_close()
