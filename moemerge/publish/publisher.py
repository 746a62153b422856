"""Send a merged model to the Hub: the whole folder at once, or shard by shard while it is made."""

import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from moemerge.checkpoint.index import SAFETENSORS_INDEX, SINGLE_SAFETENSORS, read_json, read_weight_map
from moemerge.errors import MoemergeError, PublishError, RefusedError
from moemerge.planning.tokenizer_files import COPIED_FILES, template_names
from moemerge.publish.folder import checkpoint_files, name_in_repository
from moemerge.publish.hub_errors import explain
from moemerge.publish.repository import (
    Account,
    Repository,
    check_names,
    check_repository,
    create_repository,
    read_account,
)
from moemerge.sources.model_folder import Announce
from moemerge.sources.remote_weights import TEMPLATES
from moemerge.sources.retries import WAIT_STATUSES, Result, patiently

__all__ = ["Publisher", "Repository", "checkpoint_files"]

# Files that a reader loads as a model: one of an older model that stays would make a mixture with the new one.
_WEIGHTS: Final = re.compile(r"[^/]+\.(safetensors|bin|h5|msgpack)(\.index\.json)?")
# Files that make a repository look like a finished model.
_SEALS: Final = frozenset({"config.json", SAFETENSORS_INDEX})
_READ_BESIDE: Final = frozenset({*COPIED_FILES, "config.json", "adapter_config.json"})
_TEMPLATE: Final = re.compile(rf"{TEMPLATES}/[^/]+\.jinja")
_SHOWN: Final = 3
_log: Final = logging.getLogger(__name__)


class Publisher:
    """Sends a model to one repository; the token is the Hub client's: HF_TOKEN, or that of `hf auth login`.

    Every method raises PublishError for a failure, and RefusedError where the repository or the command has to change.
    """

    def __init__(self, repository: Repository, announce: Announce) -> None:
        self._repository, self._announce = repository, announce
        self._api = HfApi(token=True)  # needed, whatever HF_HUB_DISABLE_IMPLICIT_TOKEN says
        self._account = Account("", ())
        self.revision = repository.revision or "main"
        """The revision that commits go to; for a pull request that `begin_streaming` opens, its `refs/pr/N`."""

    @property
    def repo(self) -> str:
        """The repository, `user/name`."""
        return self._repository.name

    @property
    def url(self) -> str:
        """The page of the repository, its branch, or its pull request."""
        page = f"{self._api.endpoint}/{self.repo}"
        if self.revision == "main":
            return page
        number = self.revision.removeprefix("refs/pr/")
        return f"{page}/tree/{quote(number)}" if number == self.revision else f"{page}/discussions/{number}"

    def open(self) -> None:
        """Make sure, before any work, that the Hub will take the model; creates nothing."""
        check_names(self._repository)
        with self._explained():
            self._account = self._ask(lambda: read_account(self._api, self._repository))
            self._ask(lambda: check_repository(self._api, self._repository, self._account))

    def create(self) -> None:
        """Create the repository, or the branch, where it is missing."""
        with self._explained():
            self._ask(lambda: create_repository(self._api, self._repository, self._announce))

    def check_replaced(self, model_type: object, *, overwrite: bool) -> None:
        """Make sure that no model of another kind is replaced: a dense one is likely to be a source of the merge.

        Raises:
            RefusedError: the repository holds such a model, and is not to be overwritten.
        """
        with self._explained():
            revision, names = self._beginning()
            if overwrite or "config.json" not in names:
                return
            path = self._api.hf_hub_download(self.repo, "config.json", revision=revision)
        held = read_json(Path(path)).get("model_type")
        if held and held != model_type:
            raise RefusedError(
                f"{self.repo}: {revision} holds a {held}, and this is a {model_type}. Name another repository "
                "or --revision, or replace the model with --overwrite."
            )

    def push(self, folder: Path) -> str:
        """Send a folder's checkpoint in one commit, without weights that the repository has or a cut-off push sent.

        Files of an older model that the folder lacks are removed in the same commit. Returns the page's URL.

        Raises:
            CheckpointError, SourceError: the folder holds no complete checkpoint; nothing is sent.
        """
        paths = checkpoint_files(folder, self._announce)
        options = (
            ["--revision", self._repository.revision]
            if self._repository.revision
            else ["--create-pr"] * self._repository.create_pr
        )
        again = shlex.join(["moemerge", "push", str(folder), self.repo, *options])
        with self._explained(f"\nThe model is complete in {folder}: `{again}` sends what is missing."):
            commit, names = self._listing()
            stale = self._stale(names, set(map(name_in_repository, paths)))
            self._announce(f"{self.repo}: reading {len(paths)} files, and sending what is not there")
            operations: list[CommitOperationAdd | CommitOperationDelete] = [*self._additions(paths), *stale]
            sent = self._ask(
                lambda: self._api.create_commit(
                    self.repo,
                    operations,
                    commit_message=f"Upload {self.repo.partition('/')[2]}",
                    revision=self._repository.revision,
                    create_pr=self._repository.create_pr,
                    parent_commit=commit,
                )
            )
        if self._repository.create_pr and not sent.pr_url:
            self._announce(f"{self.repo}: holds these files already, so there is nothing to propose")
        return sent.pr_url or self.url

    def held(self) -> Mapping[str, tuple[str, int]]:
        """SHA-256 and size of each large file that the revision holds, by name; empty if there is no revision yet."""
        with self._explained():
            try:
                files = self._ask(lambda: list(self._api.list_repo_tree(self.repo, revision=self.revision)))
            except GatedRepoError:
                raise
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return {}
        large = [(file.path, lfs) for file in files if (lfs := getattr(file, "lfs", None))]
        return {name: (lfs.sha256, lfs.size) for name, lfs in large}

    def check_streaming(self, *, overwrite: bool) -> None:
        """Make sure that shards may be sent to the revision; changes nothing.

        Raises:
            RefusedError: the revision holds a finished model, and is not to be overwritten.
        """
        with self._explained():
            revision, names = self._beginning()
        finished = _SEALS.intersection(names)
        if finished and not overwrite:
            raise RefusedError(
                f"{self.repo}: {revision} holds a model already ({', '.join(sorted(finished))}). "
                "Name another repository or --revision, or replace the model with --overwrite."
            )

    def begin_streaming(self) -> None:
        """Prepare for shards: from here to `finish` the revision does not look like a finished model.

        Weights that a cut-off run sent stay. A pull request is opened here.
        """
        with self._explained():
            _, names = self._listing()
            if self._repository.create_pr:
                title = f"Upload {self.repo.partition('/')[2]}"
                pull_request = self._ask(lambda: self._api.create_pull_request(self.repo, title))
                self.revision = f"refs/pr/{pull_request.num}"
                self._announce(f"{self.repo}: opened {self.url}; --revision {self.revision} continues it")
            if _SEALS.intersection(names):
                self._commit("Remove the older model", self._stale(names, ()))

    def __getstate__(self) -> dict[str, Any]:
        """Give what another process sends files by, with the token that it has itself."""
        return {**self.__dict__, "_announce": _log.info}

    def send(self, path: Path) -> str:
        """Send and commit one shard; see `add`."""
        return self.add(self.upload(path))

    def upload(self, path: Path) -> CommitOperationAdd:
        """Send a shard's bytes, unless the Hub has them; returns what `add` commits, also in another process."""
        with self._explained():
            addition = CommitOperationAdd(path.name, path)
            self._ask(lambda: self._api.preupload_lfs_files(self.repo, [addition], revision=self.revision))
        return addition

    def add(self, addition: CommitOperationAdd) -> str:
        """Commit a shard that was sent, and check that the Hub names the same SHA-256; returns it.

        Raises:
            PublishError: the Hub holds something else.
        """
        name = addition.path_in_repo
        with self._explained():
            self._commit(f"Add {name}", [addition])
            sha256, nbytes = addition.upload_info.sha256.hex(), addition.upload_info.size
            files = self._ask(lambda: self._api.get_paths_info(self.repo, [name], revision=self.revision))
        held = [f"{lfs.size} bytes with SHA-256 {lfs.sha256}" for f in files if (lfs := getattr(f, "lfs", None))]
        expected = f"{nbytes} bytes with SHA-256 {sha256}"
        if held != [expected]:
            raise PublishError(
                f"{self.repo}: {name}: expected {expected}, "
                f"the Hub holds {' and '.join(held) or 'no such large file'}. Send it again."
            )
        self._announce(f"{self.repo}: holds {name}")
        return sha256

    def finish(self, folder: Path) -> str:
        """Send what is left in the folder, in one commit that makes the model complete; returns the page's URL.

        Raises:
            PublishError: a shard of the index is neither in the folder nor on the Hub; nothing is committed.
        """
        paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        paths += [folder / name for name in template_names(folder)]
        index = folder / SAFETENSORS_INDEX
        shards = set(read_weight_map(index).values()) if index.exists() else {SINGLE_SAFETENSORS}
        kept = shards | set(map(name_in_repository, paths))
        with self._explained():
            _, names = self._listing()
            if lost := shards.difference(names, (path.name for path in paths)):
                raise PublishError(
                    f"{self.repo}: {self.revision} has no {', '.join(sorted(lost))}, so the model is not complete. "
                    "Run the same command again: it sends what is missing."
                )
            self._commit("Complete the model", [*self._additions(paths), *self._stale(names, kept)])
        return self.url

    def _beginning(self) -> tuple[str, list[str]]:
        """The revision, or main if a new branch will be made of it, and the names of its files."""
        try:
            return self.revision, self._listing()[1]
        except RevisionNotFoundError:
            return "main", self._listing("main")[1]
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return "main", []

    def _listing(self, revision: str | None = None) -> tuple[str | None, list[str]]:
        """The revision's commit and the names of its files."""
        info = self._ask(lambda: self._api.model_info(self.repo, revision=revision or self.revision))
        return info.sha, [file.rfilename for file in info.siblings or []]

    @staticmethod
    def _additions(paths: Collection[Path]) -> list[CommitOperationAdd]:
        return [CommitOperationAdd(name_in_repository(path), path) for path in paths]

    def _stale(self, names: Collection[str], kept: Collection[str]) -> list[CommitOperationDelete]:
        """Operations that remove the repository's files of an older model, those that a reader would load."""
        stale = [
            name
            for name in sorted(names)
            if name not in kept and (name in _READ_BESIDE or _WEIGHTS.fullmatch(name) or _TEMPLATE.fullmatch(name))
        ]
        if stale:
            more = " ..." if len(stale) > _SHOWN else ""
            self._announce(f"{self.repo}: removing files of an older model: {', '.join(stale[:_SHOWN])}{more}")
        return [CommitOperationDelete(name, is_folder=False) for name in stale]

    def _commit(self, message: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> None:
        self._ask(
            lambda: self._api.create_commit(self.repo, operations, commit_message=message, revision=self.revision)
        )

    def _ask(self, action: Callable[[], Result]) -> Result:
        """Ask the Hub again as long as it answers that there were too many requests, and to wait."""
        return patiently(self.repo, self._announce, action, WAIT_STATUSES)

    @contextmanager
    def _explained(self, after: str = "") -> Iterator[None]:
        """Turn whatever the client raises into a message for the user; its HTTP library differs by version."""
        try:
            yield
        except MoemergeError:
            raise
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"not everything was sent to {self.repo}.{after}") from error
        except Exception as error:
            kind, text = explain(error, self._repository, self._account)
            raise kind(f"{self.repo}: {text}{after}") from error
