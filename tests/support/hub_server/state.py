"""What a Hub holds: contents of files, repositories with their history, and users."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path

from tests.support.hub_server.answer import AnswerError

IN_LFS = (".safetensors", ".bin", ".gguf", "tokenizer.json", "tokenizer.model")
"""Ends of the names of files that are in LFS where there is no `.gitattributes`."""
# A new repository is born with these, all in LFS.
ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        "*.7z", "*.bin", "*.ckpt", "*.gguf", "*.gz", "*.h5", "*.model", "*.msgpack", "*.npz", "*.onnx", "*.parquet",
        "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.tar", "*.zip", "tokenizer.json",
    )
).encode()  # fmt: skip
CHUNK = 1 << 20
# Dates follow from the order of commits alone, so that two Hubs with the same pushes are equal.
BEGINNING = datetime(2025, 1, 1, tzinfo=timezone.utc)

Content = bytes | Path
"""What a file holds, or where on disk it is."""
Files = dict[str, Content]


@dataclass(frozen=True, eq=False)
class Blob:
    """The content of a file, and whether it is in LFS."""

    content: Content
    in_lfs: bool

    @cached_property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @cached_property
    def sha256(self) -> str:
        return self._digest("sha256", b"")

    @cached_property
    def oid(self) -> str:
        """Git's name of it, or of the pointer to it."""
        return blob_id(self.pointer) if self.in_lfs else self._digest("sha1", b"blob %d\0" % self.size)

    @cached_property
    def pointer(self) -> bytes:
        """What Git holds in place of a file in LFS."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    def read(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content

    def _digest(self, algorithm: str, prefix: bytes) -> str:
        if isinstance(self.content, Path):
            state = self.content.stat()
            return _digest_file(algorithm, prefix, self.content, state.st_size, state.st_mtime_ns)
        return hashlib.new(algorithm, prefix + self.content, usedforsecurity=False).hexdigest()


@cache
def _digest_file(algorithm: str, prefix: bytes, path: Path, size: int, changed: int) -> str:
    """Once for each size and time of change, by which a changed file is told."""
    digest = hashlib.new(algorithm, prefix, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(eq=False)
class Commit:
    """A commit; its blobs change only when a test replaces one."""

    hash: str
    parent: "Commit | None"
    blobs: dict[str, Blob]
    title: str
    message: str
    author: str
    date: str

    def history(self) -> Iterator["Commit"]:
        """It and the commits before it."""
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent

    def folders(self) -> set[str]:
        parts = [path.split("/") for path in self.blobs]
        return {"/".join(names[:depth]) for names in parts for depth in range(1, len(names))}

    def last_change(self, path: str) -> "Commit":
        """The commit that gave a file or folder its content."""
        commit = self
        while commit.parent and commit.parent.contents(path) == self.contents(path):
            commit = commit.parent
        return commit

    def tree_id(self, folder: str) -> str:
        """A name of a folder that follows from what is in it, though not Git's own."""
        return blob_id(repr(sorted(self.contents(folder).items())).encode())

    def contents(self, path: str) -> dict[str, str]:
        return {name: blob.oid for name, blob in self.blobs.items() if name == path or name.startswith(f"{path}/")}

    def keeps_in_lfs(self, path: str) -> bool:
        """Whether `.gitattributes` wants a file in LFS."""
        attributes = self.blobs.get(".gitattributes")
        if attributes is None:
            return path.endswith(IN_LFS)
        rules = [line.split() for line in attributes.read().decode().splitlines() if "filter=lfs" in line]
        return any(matches(path, pattern) for pattern, *_ in rules)


def matches(path: str, pattern: str) -> bool:
    """Git's patterns, as far as they are needed: with a slash of the path, without of the name."""
    return fnmatch(path, pattern.lstrip("/")) if "/" in pattern else fnmatch(path.rpartition("/")[2], pattern)


@dataclass
class Discussion:
    """A discussion or a pull request."""

    num: int
    title: str
    description: str
    author: str
    is_pull_request: bool
    base: str = "main"
    status: str = "open"


@dataclass
class Repository:
    """A repository."""

    name: str
    gated: bool | str = False
    status: int = 200
    """Anything else is the answer to every request about it."""
    private: bool = False
    creator: str = ""
    refs: dict[str, Commit] = field(default_factory=dict)
    """The heads of branches by their names, and of pull requests by `refs/pr/N`."""
    commits: dict[str, Commit] = field(default_factory=dict)
    """All that can be read, by their hashes."""
    objects: dict[str, Blob] = field(default_factory=dict)
    """What is in LFS, by its SHA-256; more than the commits name, where an upload was not followed by a commit."""
    discussions: list[Discussion] = field(default_factory=list)
    pushes: int = 0

    @property
    def namespace(self) -> str:
        return self.name.rpartition("/")[0]

    def find(self, revision: str) -> tuple[str, Files]:
        """The commit and the files of a branch, pull request or commit."""
        commit = self.commit(revision)
        return commit.hash, {path: blob.content for path, blob in commit.blobs.items()}

    def commit(self, revision: str) -> Commit:
        found = self.refs.get(revision.removeprefix("refs/heads/")) or self.commits.get(revision)
        if found is None:
            raise AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def push(
        self,
        ref: str,
        blobs: dict[str, Blob],
        parent: Commit | None,
        *,
        title: str = "",
        message: str = "",
        author: str = "",
    ) -> Commit:
        """Make a commit the head of a branch or pull request."""
        self.pushes += 1
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(blobs.items()))
        text = f"{self.name} {self.pushes} {parent and parent.hash}\n{listing}"
        date = (BEGINNING + timedelta(seconds=self.pushes)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        name = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        commit = Commit(name, parent, blobs, title, message, author, date)
        self.commits[name] = self.refs[ref] = commit
        self.objects |= {blob.sha256: blob for blob in blobs.values() if blob.in_lfs}
        return commit

    def drop(self, ref: str) -> None:
        """Take a branch and the commits that only it led to away."""
        lost = self.refs.pop(ref)
        kept = {commit.hash for head in self.refs.values() for commit in head.history()}
        for commit in lost.history():
            if commit.hash not in kept:
                self.commits.pop(commit.hash, None)

    def open(
        self, title: str, description: str, author: str, *, pull_request: bool, status: str = "open"
    ) -> Discussion:
        discussion = Discussion(len(self.discussions) + 1, title, description, author, pull_request, status=status)
        self.discussions.append(discussion)
        return discussion


@dataclass
class User:
    """Who a token belongs to, and what it may do."""

    name: str
    orgs: dict[str, str] = field(default_factory=dict)
    """Of each organisation the user's role there: admin, write, contributor or read."""
    role: str = "write"
    """The token's role: read, write or fineGrained."""
    scopes: dict[str, list[str]] = field(default_factory=dict)
    """Of a fineGrained token, what it may do with a user's, an organisation's or one repository's content."""
    accepted: set[str] = field(default_factory=set)
    """Gated repositories whose terms were accepted."""
    reads_gated: bool = False
    """Whether a fineGrained token may read gated repositories."""

    def role_in(self, namespace: str) -> str:
        return "admin" if namespace == self.name else self.orgs.get(namespace, "")

    def permissions(self, repo: str) -> set[str]:
        return {*self.scopes.get(repo, ()), *self.scopes.get(repo.rpartition("/")[0], ())}

    def may_see(self, repository: Repository) -> bool:
        if not repository.private:
            return True
        permitted = self.role != "fineGrained" or self.permissions(repository.name) & {
            "repo.content.read",
            "repo.write",
        }
        return bool(self.role_in(repository.namespace) and permitted)

    def may_create(self, repo: str) -> bool:
        permitted = self.role == "write" or (self.role == "fineGrained" and "repo.write" in self.permissions(repo))
        return permitted and self.role_in(repo.rpartition("/")[0]) in {"admin", "write", "contributor"}

    def may_write(self, repository: Repository) -> bool:
        # Contributors to an organisation write to what they created themselves.
        contributor = self.role_in(repository.namespace) == "contributor"
        return self.may_create(repository.name) and (not contributor or repository.creator == self.name)

    def may_read_files(self, repository: Repository) -> bool:
        """Whether the gate of a repository that the user may see is open."""
        if not repository.gated or self.role_in(repository.namespace):
            return True
        return repository.name in self.accepted and (self.role != "fineGrained" or self.reads_gated)

    def facts(self) -> dict[str, object]:
        """As `whoami-v2` tells them."""
        token: dict[str, object] = {"displayName": "tests", "role": self.role, "createdAt": "2025-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            token["fineGrained"] = {
                "canReadGatedRepos": self.reads_gated,
                "global": [],
                "scoped": [
                    {
                        "entity": {"_id": identity(name), "type": self._kind(name), "name": name},
                        "permissions": permissions,
                    }
                    for name, permissions in self.scopes.items()
                ],
            }
        orgs = [
            {"type": "org", "id": identity(name), "name": name, "fullname": name, "email": None, "canPay": False,
             "periodEnd": None, "avatarUrl": "", "roleInOrg": role, "isEnterprise": False}
            for name, role in self.orgs.items()
        ]  # fmt: skip
        return {
            "type": "user",
            "id": identity(self.name),
            "name": self.name,
            "fullname": self.name,
            "isPro": False,
            "avatarUrl": "",
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }

    def _kind(self, name: str) -> str:
        return "model" if "/" in name else "user" if name == self.name else "org"


def identity(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def folder_files(folder: Path) -> Files:
    """The files of a folder as they lie there; what begins with a dot is left out, but not `.gitattributes`."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = {name for name in found if any(part.startswith(".") for part in name.split("/"))} - {".gitattributes"}
    return {name: path.absolute() for name, path in found.items() if name not in hidden}
