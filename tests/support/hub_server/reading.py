"""What the Hub itself answers: who one is, what there is, and where it lies."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, quote, unquote

import yaml

from tests.support.hub_server.answer import AnswerError
from tests.support.hub_server.counting import Request
from tests.support.hub_server.serving import Handler

if TYPE_CHECKING:
    from tests.support.hub_server.state import Blob, Commit, Repository, User

PAGE_ENTRIES_EXPANDED = 50
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


class ReadingHandler(Handler):
    """The half that changes nothing."""

    host = "hub"
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", "/api/whoami-v2", "send_user"),
        ("GET", "/api/models", "send_models"),
        ("GET", "/api/models/REPO/auth-check", "check_gate"),
        ("GET", "/api/models/REPO/refs", "send_refs"),
        ("GET", "/api/models/REPO/revision/PART", "send_info"),
        ("GET", "/api/models/REPO/commits/PART", "send_commits"),
        ("GET", "/api/models/REPO/tree/PART(?:/(.+))?", "send_tree"),
        ("POST", "/api/models/REPO/paths-info/PART", "send_paths"),
        ("GET", "/api/models/REPO/discussions/PART", "send_discussion"),
        ("GET", "/api/models/REPO", "send_info"),
        ("GET", "/REPO/resolve/PART/(.+)", "send_resolved"),
    ]

    def answer(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in self.routes:
            expression = pattern.replace("REPO", "([^/]+/[^/]+|[^/]+)").replace("PART", "([^/]+)")
            if wanted == method and (match := re.fullmatch(expression, self.route)):
                getattr(self, name)(*(unquote(group) for group in match.groups() if group is not None))
                return
        raise AnswerError(404, message="Sorry, we can't find the page you are looking for.")

    @property
    def user(self) -> User | None:
        """Who asks; nobody where there is no token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user = self.hub.find_user(token)
        if token and user is None:
            raise AnswerError(401, message="Invalid credentials in Authorization header")
        return user

    def need_user(self) -> User:
        if self.user is None:
            raise AnswerError(401, message="Invalid username or password.")
        return self.user

    def repository(self, repo: str) -> Repository:
        """A repository, for who may know of it."""
        user = self.user
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not (user and user.may_see(found))):
            # Who is not logged in does not learn whether it is private or absent.
            raise AnswerError(404 if user else 401, "RepoNotFound", "Repository not found")
        if found.status != 200:
            raise AnswerError(found.status, message="Told to fail")
        return found

    def send_user(self) -> None:
        self.send_json(self.need_user().facts())

    def check_gate(self, repo: str) -> None:
        self.enter(self.repository(repo))
        self.send_json({})

    def enter(self, repository: Repository) -> None:
        """Refuse who may not read a gated repository's files."""
        user = self.user
        if repository.gated and not (user and user.may_read_files(repository)):
            message = f"Access to model {repository.name} is restricted."
            raise AnswerError(403 if user else 401, "GatedRepo", message)

    def send_models(self) -> None:
        """The public ones, of one author or with names that contain a text."""
        author, text = (self.query.get(name, [""])[0] for name in ("author", "search"))
        repositories = self.hub.repositories.values()
        names = [r.name for r in repositories if not r.private and author in {"", r.namespace} and text in r.name]
        self.send_json([{"_id": "0" * 24, "id": name, "modelId": name} for name in sorted(names)])

    def send_info(self, repo: str, revision: str = "main") -> None:
        repository = self.repository(repo)
        commit = repository.commit(revision)
        facts: dict[str, Any] = {
            "_id": commit.hash[:24], "id": repo, "modelId": repo, "author": repository.namespace, "sha": commit.hash,
            "lastModified": commit.date, "createdAt": [*commit.history()][-1].date, "private": repository.private,
            "gated": "auto" if repository.gated is True else repository.gated, "disabled": False, "downloads": 0,
            "likes": 0, "tags": [], "usedStorage": sum(blob.size for blob in repository.objects.values()),
            "siblings": [self._sibling(path, blob) for path, blob in sorted(commit.blobs.items())],
        }  # fmt: skip
        with suppress(yaml.YAMLError):
            metadata = parse_metadata(read_card(commit.blobs))
            if isinstance(metadata, dict):
                facts |= {"cardData": metadata, "tags": metadata.get("tags", [])}
                facts |= {name: metadata[name] for name in ("library_name", "pipeline_tag") if name in metadata}
        if wanted := self.query.get("expand"):
            facts = {name: value for name, value in facts.items() if name in {"_id", "id", *wanted}}
        self.send_json(facts)

    def _sibling(self, path: str, blob: Blob) -> dict[str, object]:
        if not self.asks("blobs"):
            return {"rfilename": path}
        lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)} if blob.in_lfs else None
        return {"rfilename": path, "blobId": blob.oid, "size": blob.size} | ({"lfs": lfs} if lfs else {})

    def send_refs(self, repo: str) -> None:
        heads = [(name, commit.hash) for name, commit in self.repository(repo).refs.items()]
        requests = [{"name": name, "ref": name, "targetCommit": head} for name, head in heads if "refs/pr/" in name]
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": head}
            for name, head in heads
            if "refs/pr/" not in name
        ]
        found: dict[str, object] = {"tags": [], "branches": branches, "converts": []}
        self.send_json(found | ({"pullRequests": requests} if self.asks("include_prs") else {}))

    def send_commits(self, repo: str, revision: str) -> None:
        self.send_page(
            [
                {
                    "id": commit.hash,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in self.repository(repo).commit(revision).history()
            ],
            self.hub.page_entries,
        )

    def send_tree(self, repo: str, revision: str, folder: str = "") -> None:
        commit = self.repository(repo).commit(revision)
        folders = commit.folders()
        if folder and folder not in folders:
            raise AnswerError(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        inside = f"{folder}/" if folder else ""
        paths = [*sorted(commit.blobs), *sorted(folders)]
        paths = [
            path
            for path in paths
            if path.startswith(inside) and (self.asks("recursive") or "/" not in path[len(inside) :])
        ]
        expand = self.asks("expand")
        most = min(PAGE_ENTRIES_EXPANDED if expand else self.hub.page_entries, self.hub.page_entries)
        self.send_page([tree_entry(commit, path, expand=expand) for path in paths], most)

    def send_page(self, entries: list[dict[str, object]], most: int) -> None:
        """Send a part of a list, with a link to the next."""
        asked = {name: values[0] for name, values in self.query.items()}
        count = min(most, int(asked.get("limit", most)))
        start = int(asked.get("cursor", 0))
        link = {}
        if start + count < len(entries):
            rest = "&".join(f"{name}={quote(value)}" for name, value in asked.items() if name != "cursor")
            link = {"Link": f'<{self.hub.url}{self.route}?{rest}&cursor={start + count}>; rel="next"'}
        self.send_json(entries[start : start + count], headers=link)

    def send_paths(self, repo: str, revision: str) -> None:
        commit = self.repository(repo).commit(revision)
        text = self.read_body().decode()
        asked = json.loads(text) if "json" in self.headers.get("Content-Type", "") else parse_qs(text)
        expand = str(asked.get("expand", "")).strip("[]'").lower() == "true"
        known = commit.blobs.keys() | commit.folders()
        paths = [path.strip("/") for path in asked.get("paths", [])]
        self.send_json([tree_entry(commit, path, expand=expand) for path in paths if path in known])

    def send_discussion(self, repo: str, number: str) -> None:
        repository = self.repository(repo)
        found = next((d for d in repository.discussions if str(d.num) == number), None)
        if found is None:
            raise AnswerError(404, message="Discussion not found")
        date, author = repository.commit("main").date, {"name": found.author}
        comment = {
            "id": f"{found.num:024x}",
            "type": "comment",
            "createdAt": date,
            "author": author,
            "data": {"edited": False, "hidden": False, "latest": {"raw": found.description}},
        }
        facts: dict[str, object] = {
            "num": found.num,
            "title": found.title,
            "author": author,
            "createdAt": date,
            "status": found.status,
            "repo": {"name": repo, "type": "model"},
            "isPullRequest": found.is_pull_request,
            "events": [comment],
        }
        if found.is_pull_request:
            facts |= {"changes": {"base": f"refs/heads/{found.base}"}, "filesWithConflicts": [], "diff": ""}
        self.send_json(facts)

    def send_resolved(self, repo: str, revision: str, path: str) -> None:
        repository = self.repository(repo)
        try:
            commit, blob = self._find_file(repository, revision, path)
        except AnswerError:
            self.hub.requests.append(Request(self.command, repo, path, 0))
            raise
        headers = {"X-Repo-Commit": commit.hash}
        if not blob.in_lfs:
            self.send_file(repo, path, blob, headers | {"ETag": f'"{blob.oid}"'})
            return
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        headers["Location"] = self.hub.locate(repo, blob, path)
        if self.command == "HEAD":
            self.hub.requests.append(Request("HEAD", repo, path, 0))
        self.send(302, b"", headers)

    def _find_file(self, repository: Repository, revision: str, path: str) -> tuple[Commit, Blob]:
        self.enter(repository)
        commit = repository.commit(revision)
        if path not in commit.blobs:
            raise AnswerError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.hash})
        return commit, commit.blobs[path]


def tree_entry(commit: Commit, path: str, *, expand: bool) -> dict[str, object]:
    """A file or folder, as lists of them have it."""
    blob = commit.blobs.get(path)
    entry: dict[str, object] = {"type": "directory", "path": path, "size": 0, "oid": commit.tree_id(path)}
    if blob:
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.in_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    if expand:
        change = commit.last_change(path)
        entry["lastCommit"] = {"id": change.hash, "title": change.title, "date": change.date}
    return entry


def read_card(blobs: dict[str, Blob]) -> str:
    """The model card, empty where there is none."""
    return blobs["README.md"].read().decode(errors="replace") if "README.md" in blobs else ""


def parse_metadata(card: str) -> Any:
    """What the YAML at the head of a model card says; None where there is none."""
    match = FRONT_MATTER.match(card)
    return yaml.safe_load(match[1]) if match else None
