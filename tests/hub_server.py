"""A small Hub on this machine: the part of the Hub's protocol that `huggingface_hub.snapshot_download` uses.

- `GET /api/models/{repo}` and `/api/models/{repo}/revision/{revision}`: the commit and the names of its files
- `GET /api/models/{repo}/tree/{revision}`: files and folders with sizes and hashes, in pages with a `Link` to the next
- `HEAD` and `GET /{repo}/resolve/{revision}/{path}`: `ETag`, `X-Repo-Commit`, `Content-Length`; files in Git LFS are
  redirected to a second address, as the Hub does to its CDN, with `X-Linked-ETag` and `X-Linked-Size`
- `Range` requests, and on demand a download that breaks off in the middle
- errors with `X-Error-Code`: 401 and 404 for a repository that the caller may not see, 404 for a revision or a file
  that there is not, 401 and 403 for files of a gated repository; on demand any status

Not served: Xet, data sets, uploads, search.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

IN_LFS = (".safetensors", ".bin", ".gguf", "tokenizer.json", "tokenizer.model")
PAGE_ENTRIES = 1000
PAGE_ENTRIES_EXPANDED = 50

Files = dict[str, bytes]


class Request(NamedTuple):
    """A request for a file."""

    method: str
    repo: str
    path: str
    start: int
    """First byte that was asked for."""


class AnswerError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.message = message
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {name: value for name, value in named.items() if value} | headers


@dataclass
class Repository:
    """A repository."""

    branches: dict[str, tuple[str, Files]] = field(default_factory=dict)
    """Commit and files of each."""
    gated: bool = False
    status: int = 200
    """Anything else is the answer to every request about it."""

    def find(self, revision: str) -> tuple[str, Files]:
        """The commit and the files of a branch or commit."""
        for branch, (commit, files) in self.branches.items():
            if revision in {branch, commit}:
                return commit, files
        raise AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class Hub:
    """What is served, and what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, set[str]] = {}
        """Of each user, the gated repositories whose terms were accepted."""
        self.page_entries = PAGE_ENTRIES
        self.breaks_off: set[str] = set()
        """Files whose first download ends in the middle."""
        self.requests: list[Request] = []
        self.url = self.cdn_url = ""

    def add(self, repo: str, files: Files, revision: str = "main", *, gated: bool = False, status: int = 200) -> None:
        """Push a branch; the repository is created with the first."""
        repository = self.repositories.setdefault(repo, Repository(gated=gated, status=status))
        listing = "".join(f"{path} {_blob_id(content)}" for path, content in sorted(files.items()))
        repository.branches[revision] = (_blob_id(listing.encode()), files)

    def requested(self, repo: str) -> set[str]:
        """The files of a repository that were asked for in any way."""
        return {request.path for request in self.requests if request.repo == repo}

    def downloaded(self, repo: str) -> list[str]:
        """The files of a repository whose bytes were sent, once for each time."""
        return sorted(request.path for request in self.requests if request.repo == repo and request.method == "GET")

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve while the block runs; gives the address for `HF_ENDPOINT`."""
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, self)) for kind in (_HubHandler, _CdnHandler)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        for server in servers:
            server.daemon_threads = True
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self.url
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "Hub"

    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        try:
            self.answer()
        except AnswerError as error:
            text = json.dumps({"error": error.message}).encode()
            self.send(error.status, text, {"Content-Type": "application/json", **error.headers})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        """Answer with `content`, or, to break off, with its first `sent` bytes."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # the caller has gone
                self.wfile.write(content[:sent])
        self.close_connection = self.close_connection or sent is not None

    def send_file(self, repo: str, path: str, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(match[1]), int(match[2] or len(content) - 1)) if match else (0, len(content) - 1)
        first = not any(r.method == "GET" and r.path == path for r in self.hub.requests)
        self.hub.requests.append(Request(self.command, repo, path, start))
        headers = headers | {"Accept-Ranges": "bytes"}
        if match and start >= len(content):
            raise AnswerError(416, **{"Content-Range": f"bytes */{len(content)}"})
        if match:
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        part = content[start : end + 1]
        breaks_off = self.command == "GET" and first and path in self.hub.breaks_off
        self.send(206 if match else 200, part, headers, sent=len(part) // 2 if breaks_off else None)

    def log_message(self, *_: object) -> None:
        """Tests read what was requested from `Hub.requests`."""


class _HubHandler(_Handler):
    def answer(self) -> None:
        url = urlsplit(self.path)
        if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+))?", url.path):
            repo, kind, revision = match[1], match[2] or "revision", unquote(match[3] or "main")
            commit, files = self.repository(repo).find(revision)
            if kind == "tree":
                self.send_tree(url.path, parse_qs(url.query), files)
            else:
                siblings = [{"rfilename": path} for path in sorted(files)]
                self.send_json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url.path):
            self.send_resolved(match[1], unquote(match[2]), unquote(match[3]))
        else:
            raise AnswerError(404, message="Sorry, we can't find the page you are looking for.")

    @property
    def user(self) -> str | None:
        """The caller's token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise AnswerError(401, message="Invalid credentials in Authorization header")
        return token or None

    def repository(self, repo: str) -> Repository:
        user = self.user
        found = self.hub.repositories.get(repo)
        if found is None:
            # Who is not logged in does not learn whether it is private or absent.
            raise AnswerError(404 if user else 401, "RepoNotFound", "Repository not found")
        if found.status != 200:
            raise AnswerError(found.status, message="Told to fail")
        return found

    def send_json(self, value: object, **headers: str) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def send_tree(self, path: str, query: dict[str, list[str]], files: Files) -> None:
        asked = {name: values[0] for name, values in query.items()}
        folders = {path[: match.start()] for path in files for match in re.finditer("/", path)}
        entries = [_file_entry(path, content) for path, content in sorted(files.items())]
        entries += [{"type": "directory", "path": path, "size": 0, "oid": _blob_id(b"")} for path in sorted(folders)]
        if asked.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if "/" not in str(entry["path"])]
        most = PAGE_ENTRIES_EXPANDED if asked.get("expand", "false").lower() == "true" else PAGE_ENTRIES
        count = min(most, self.hub.page_entries, int(asked.get("limit", most)))
        start = int(asked.get("cursor", 0))
        link = {}
        if start + count < len(entries):
            rest = "&".join(f"{name}={quote(value)}" for name, value in asked.items() if name != "cursor")
            link = {"Link": f'<{self.hub.url}{path}?{rest}&cursor={start + count}>; rel="next"'}
        self.send_json(entries[start : start + count], **link)

    def send_resolved(self, repo: str, revision: str, path: str) -> None:
        repository = self.repository(repo)
        if repository.gated and (self.user is None or repo not in self.hub.tokens[self.user]):
            self.hub.requests.append(Request(self.command, repo, path, 0))
            raise AnswerError(403 if self.user else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        commit, files = repository.find(revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self.hub.requests.append(Request(self.command, repo, path, 0))
            raise AnswerError(404, "EntryNotFound", "Entry not found", **headers)
        content = files[path]
        if not path.endswith(IN_LFS):
            self.send_file(repo, path, content, headers | {"ETag": f'"{_blob_id(content)}"'})
            return
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        headers["Location"] = f"{self.hub.cdn_url}/{quote(repo, safe='')}/{commit}/{quote(path)}"
        if self.command == "HEAD":
            self.hub.requests.append(Request("HEAD", repo, path, 0))
        self.send(302, b"", headers)


class _CdnHandler(_Handler):
    def answer(self) -> None:
        if "Authorization" in self.headers:
            raise AnswerError(400, message="A token was sent to another host")
        _, repo, commit, path = self.path.split("/", 3)
        repo, path = unquote(repo), unquote(path)
        _, files = self.hub.repositories[repo].find(commit)
        self.send_file(
            repo, path, files[path], {"ETag": f'"{hashlib.md5(files[path], usedforsecurity=False).hexdigest()}"'}
        )


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _file_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if path.endswith(IN_LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 132}
    return entry
