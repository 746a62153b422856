"""What the Hub lets be written: repositories, branches, pull requests, objects in LFS, and commits."""

from __future__ import annotations

import base64
import json
import secrets
from typing import Any, ClassVar

import yaml

from tests.support.hub_server.answer import AnswerError
from tests.support.hub_server.reading import ReadingHandler, parse_metadata, read_card
from tests.support.hub_server.state import ATTRIBUTES, Blob, Commit, Repository, matches
from tests.support.hub_server.storage import Incoming

NO_SUCH_OBJECT = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
    "For instance, this can happen if you used git push --no-verify to push your changes. Offending file: - "
)
PRIVATE_FULL = (
    "Private repository storage limit reached, please upgrade your plan to increase your private storage limit"
)
PUBLIC_FULL = "Your storage patterns tripped our internal systems! Please contact us so we can verify your account"


class HubHandler(ReadingHandler):
    """Both halves."""

    routes: ClassVar = [
        ("POST", "/api/repos/create", "create_repository"),
        ("POST", "/api/validate-yaml", "validate_card"),
        ("POST", "/api/models/REPO/branch/PART", "create_branch"),
        ("POST", "/api/models/REPO/discussions", "create_discussion"),
        ("POST", "/api/models/REPO/preupload/PART", "prepare_upload"),
        ("POST", "/api/models/REPO/commit/PART", "commit"),
        ("POST", r"/REPO\.git/info/lfs/objects/batch", "plan_uploads"),
        ("POST", r"/REPO\.git/info/lfs/objects/verify", "verify_upload"),
        ("POST", "/api/complete_multipart", "complete_upload"),
        *ReadingHandler.routes,
    ]

    def read_json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.read_body())
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise AnswerError(400, message="The body is not a JSON object")
        return value

    def writable(self, repo: str) -> Repository:
        """A repository that the caller may write to."""
        repository = self.repository(repo)
        if not self.need_user().may_write(repository):
            message = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request."
            raise AnswerError(403, message=message)
        return repository

    def target(self, repo: str, revision: str) -> Repository:
        """A repository for a commit; everyone may open a pull request, and go on with their own."""
        repository, user = self.repository(repo), self.need_user()
        own = {f"refs/pr/{found.num}" for found in repository.discussions if found.author == user.name}
        return repository if self.asks("create_pr") or revision in own else self.writable(repo)

    def create_repository(self) -> None:
        asked, user = self.read_json(), self.need_user()
        namespace = asked.get("organization") or user.name
        repo = f"{namespace}/{asked['name']}"
        if asked.get("type", "model") != "model":
            raise AnswerError(400, message="There are only models here")
        if not user.may_create(repo):
            message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            raise AnswerError(403, message=message)
        url = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        with self.hub.lock:
            if repo in self.hub.repositories:
                error = AnswerError(409, message="You already created this model repo")
                # Clients read the address from the refusal, too.
                error.body |= url
                raise error
            private = asked.get("private") is True or asked.get("visibility") == "private"
            repository = self.hub.repositories[repo] = Repository(repo, private=private, creator=user.name)
            repository.push("main", {".gitattributes": Blob(ATTRIBUTES, in_lfs=False)}, None, title="initial commit")
        self.send_json(url)

    def validate_card(self) -> None:
        errors, warnings = check_card(self.read_json().get("content", ""))
        self.send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def create_branch(self, repo: str, branch: str) -> None:
        asked, repository = self.read_json(), self.writable(repo)
        if branch.startswith("refs/"):
            raise AnswerError(400, message=f"Invalid reference for a branch: {branch}")
        with self.hub.lock:
            start = repository.commit(asked.get("startingPoint") or "main")
            if branch in repository.refs:
                raise AnswerError(409, message=f"Reference already exists: refs/heads/{branch}")
            repository.refs[branch] = start
        self.send_json({})

    def create_discussion(self, repo: str) -> None:
        asked, user, repository = self.read_json(), self.need_user(), self.repository(repo)
        wanted = asked.get("pullRequest") is True
        with self.hub.lock:
            found = repository.open(
                asked["title"],
                asked.get("description", ""),
                user.name,
                pull_request=wanted,
                status="draft" if wanted else "open",
            )
            if wanted:
                repository.refs[f"refs/pr/{found.num}"] = repository.commit("main")
        self.send_json(
            {"num": found.num, "pullRequest": wanted, "url": f"{self.hub.url}/{repo}/discussions/{found.num}"}
        )

    def prepare_upload(self, repo: str, revision: str) -> None:
        asked, repository = self.read_json(), self.target(repo, revision)
        commit = repository.commit(revision)
        own = commit.blobs.get(".gitignore")
        ignore = asked.get("gitIgnore") or (own.read().decode() if own else "")
        patterns = [line for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
        self.send_json(
            {"commitOid": commit.hash, "files": [self._mode(commit, file, patterns) for file in asked["files"]]}
        )

    def _mode(self, commit: Commit, file: dict[str, Any], ignored: list[str]) -> dict[str, object]:
        """How a file is to be uploaded, and what the Hub has in its place."""
        path, sample = file["path"], base64.b64decode(file["sample"])
        in_lfs = commit.keeps_in_lfs(path) or file["size"] > self.hub.regular_up_to or b"\0" in sample
        found: dict[str, object] = {
            "path": path,
            "uploadMode": "lfs" if in_lfs else "regular",
            "shouldIgnore": any(is_ignored(path, pattern) for pattern in ignored),
        }
        # Clients compare it with the SHA-256 of what goes to LFS, and with Git's name of what does not.
        present = commit.blobs.get(path)
        return found | ({"oid": present.sha256 if present.in_lfs else present.oid} if present else {})

    def plan_uploads(self, repo: str) -> None:
        asked, repository = self.read_json(), self.writable(repo)
        if ref := asked.get("ref"):
            repository.commit(ref["name"])
        wanted = {entry["oid"]: entry["size"] for entry in asked["objects"]}
        missing = {oid: size for oid, size in wanted.items() if oid not in repository.objects}
        if missing:
            self._check_storage(repository, sum(missing.values()))
        transfers = asked.get("transfers") or ["basic"]
        parts = "multipart" in transfers and max(missing.values(), default=0) > self.hub.multipart_above
        objects = [
            {"oid": oid, "size": size, "authenticated": True}
            | ({"actions": self._actions(repo, oid, size, in_parts="multipart" in transfers)} if oid in missing else {})
            for oid, size in wanted.items()
        ]
        answer = {"transfer": "multipart" if parts else "basic", "objects": objects, "hash_algo": "sha256"}
        self.send_json(answer, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def _check_storage(self, repository: Repository, more: int) -> None:
        limit = self.hub.storage_limits.get(repository.namespace)
        if limit is not None:
            same = [r for r in self.hub.repositories.values() if r.namespace == repository.namespace]
            used = sum(blob.size for r in same if r.private == repository.private for blob in r.objects.values())
            if used + more > limit:
                raise AnswerError(403, message=PRIVATE_FULL if repository.private else PUBLIC_FULL)

    def _actions(self, repo: str, oid: str, size: int, *, in_parts: bool) -> dict[str, object]:
        """Where to put an object, and what to call when it is there."""
        name = secrets.token_hex(8)
        part_size = self.hub.part_size if in_parts and size > self.hub.multipart_above else None
        file = self.hub.store / repo.replace("/", "--") / f"{oid}.{name}" if self.hub.store else None
        incoming = self.hub.incoming[name] = Incoming(name, repo, oid, size, part_size, file)
        incoming.clear()
        upload: dict[str, object] = {"href": self.hub.locate_upload(incoming)}
        if part_size:
            urls = {f"{n:05}": self.hub.locate_upload(incoming, n) for n in range(1, incoming.parts + 1)}
            # The caller shows no token there, so that the name of the upload must do.
            upload = {
                "href": f"{self.hub.url}/api/complete_multipart?uploadId={name}",
                "header": {"chunk_size": str(part_size)} | urls,
            }
        return {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}}

    def complete_upload(self) -> None:
        incoming, asked = self.hub.incoming.get(self.query.get("uploadId", [""])[0]), self.read_json()
        if incoming is None or incoming.sha256 != asked.get("oid"):
            raise AnswerError(404, message="The specified upload does not exist.")
        tags = {part["partNumber"]: part["etag"] for part in asked["parts"]}
        if tags != incoming.tags or len(tags) != incoming.parts:
            raise AnswerError(400, message="One or more of the specified parts could not be found.")
        incoming.is_complete = True
        self.send_json({})

    def verify_upload(self, repo: str) -> None:
        asked, repository = self.read_json(), self.writable(repo)
        oid = asked["oid"]
        uploads = list(self.hub.incoming.values())
        arrived = [
            upload for upload in uploads if (upload.repo, upload.sha256, upload.is_complete) == (repo, oid, True)
        ]
        if not arrived and oid not in repository.objects:
            raise AnswerError(404, message="Object does not exist")
        for incoming in arrived:
            blob = incoming.blob
            if self.hub.trusts_uploads:
                blob.__dict__["sha256"] = oid
            self.hub.incoming.pop(incoming.name, None)
            if (blob.size, blob.sha256) == (asked["size"], oid):
                repository.objects[oid] = blob
        if oid not in repository.objects:
            raise AnswerError(422, message="The object's size or hash is not what was announced")
        self.send_json({"success": True})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines() if line.strip()]
        repository, user = self.target(repo, revision), self.need_user()
        header = next((line["value"] for line in lines if line["key"] == "header"), None)
        if header is None:
            raise AnswerError(400, message="The commit has no header")
        with self.hub.lock:
            parent = repository.commit(revision)
            if not parent.hash.startswith(header.get("parentCommit") or ""):
                raise AnswerError(412, message="A commit has happened since. Please refresh and try again.")
            blobs = dict(parent.blobs)
            for line in lines:
                if line["key"] != "header":
                    change(repository, blobs, line["key"], line["value"])
            if blobs.get("README.md") is not parent.blobs.get("README.md"):
                for error in check_card(read_card(blobs))[0]:
                    raise AnswerError(400, message=f"Invalid metadata in README.md: {error['message']}")
            track(parent, blobs)
            request = ""
            if self.asks("create_pr"):
                found = repository.open(header["summary"], header.get("description", ""), user.name, pull_request=True)
                found.base = revision
                revision, request = f"refs/pr/{found.num}", f"{self.hub.url}/{repo}/discussions/{found.num}"
            elif revision not in repository.refs:
                raise AnswerError(400, message=f"Not a branch: {revision}")
            done = repository.push(
                revision,
                blobs,
                parent,
                title=header["summary"],
                message=header.get("description", ""),
                author=user.name,
            )
        answer = {"success": True, "commitOid": done.hash, "commitUrl": f"{self.hub.url}/{repo}/commit/{done.hash}"}
        self.send_json(answer | {"hookOutput": ""} | ({"pullRequestUrl": request} if request else {}))


def change(repository: Repository, blobs: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """Do one line of a commit."""
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
        blobs[path] = Blob(content, in_lfs=False)
    elif key == "lfsFile":
        found = repository.objects.get(value["oid"])
        if found is None or value.get("size", found.size) != found.size:
            raise AnswerError(400, message=NO_SUCH_OBJECT + path)
        blobs[path] = found
    elif key in {"deletedFile", "deletedFolder"}:
        whole = path.rstrip("/") + "/"
        gone = [name for name in blobs if name.startswith(whole)] if key == "deletedFolder" else [path]
        if not gone or not blobs.keys() >= set(gone):
            raise AnswerError(404, "EntryNotFound", "A file with this name doesn't exist")
        for name in gone:
            del blobs[name]
    else:
        raise AnswerError(400, message=f"Unknown operation: {key}")


def track(parent: Commit, blobs: dict[str, Blob]) -> None:
    """Add files that went to LFS for their sizes or contents alone to `.gitattributes`, as the Hub does."""
    attributes = blobs.get(".gitattributes")
    if attributes is None:
        return
    after = Commit("", parent, blobs, "", "", "", "")
    more = [path for path, blob in sorted(blobs.items()) if blob.in_lfs and not after.keeps_in_lfs(path)]
    lines = "".join(f"{path} filter=lfs diff=lfs merge=lfs -text\n" for path in more)
    if lines:
        blobs[".gitattributes"] = Blob(attributes.read() + lines.encode(), in_lfs=False)


def is_ignored(path: str, pattern: str) -> bool:
    """Whether a line of `.gitignore` means a file or a folder that it is in."""
    whole = pattern.rstrip("/")
    parts = path.split("/")
    above = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    return any(matches(name, whole) for name in ([*above, path] if whole == pattern else above))


def check_card(text: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Errors and warnings about the YAML at the head of a model card."""
    try:
        metadata = parse_metadata(text)
    except yaml.YAMLError as error:
        return [{"message": f"YAML: {str(error).splitlines()[0]}"}], []
    if not isinstance(metadata, dict | None):
        return [{"message": "The metadata is not a table"}], []
    return [], [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
