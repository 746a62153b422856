"""A model's destination on the Hub, and checks before any work that the Hub will take the model."""

import re
from dataclasses import dataclass
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from moemerge.errors import PublishError, RefusedError
from moemerge.sources.model_folder import Announce

_PULL_REQUEST: Final = re.compile(r"refs/pr/[1-9]\d*")
_WRITING_ROLES: Final = frozenset({"admin", "write", "contributor"})


@dataclass(frozen=True)
class Destination:
    """A repository on the Hub and how a model is sent there."""

    repo: str
    private: bool = False
    """Whether a new repository is created private; then a public one is refused."""
    revision: str | None = None
    """A branch, created where it is missing, or a pull request as `refs/pr/N`; None for `main`."""
    create_pr: bool = False


@dataclass(frozen=True)
class Account:
    """The account that a token belongs to."""

    name: str
    places: tuple[str, ...]
    """Where the account may write, as far as the Hub says: repositories, and namespaces as `user/...`."""


def may_not_write(account: Account, why: str = "") -> str:
    """The message for an account that may not write to a repository, with what the Hub said."""
    places = " or ".join(account.places) or "nothing"
    return f"{account.name} may not write there{why}. The token may write to {places}."


def check_names(to: Destination) -> None:
    """Refuse what cannot be a destination, without asking the Hub.

    Raises:
        RefusedError: says what is wrong with the name or the options.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", to.repo, re.ASCII):
        raise RefusedError(f"{to.repo}: is no repository's name. Write user/name, or organisation/name.")
    if to.create_pr and to.revision:
        raise RefusedError(
            "--create-pr, --revision: give one of them, not both; an open pull request is --revision refs/pr/N."
        )
    if to.revision and re.fullmatch(r"[0-9a-f]{40}", to.revision):
        raise RefusedError(f"--revision: {to.revision} is a commit, which cannot change. Name a branch.")
    if to.revision and to.revision.startswith("refs/") and not _PULL_REQUEST.fullmatch(to.revision):
        raise RefusedError(f"--revision: {to.revision!r} is no branch. Write its name alone, or refs/pr/N.")


def read_account(api: HfApi, to: Destination) -> Account:
    """Find the account of the token, if the token may write at all.

    Raises:
        PublishError: the token can only read.
    """
    who: dict[str, Any] = api.whoami()
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise PublishError(
            f"{to.repo}: the token of {who['name']} may only read. Make one that may write at "
            f"{api.endpoint}/settings/tokens, and log in with `hf auth login`, or set HF_TOKEN."
        )
    writing = [org["name"] for org in who.get("orgs") or [] if org.get("roleInOrg") in _WRITING_ROLES]
    places = tuple(f"{namespace}/..." for namespace in (who["name"], *writing))
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        granted = {permission for scope in scopes for permission in scope.get("permissions") or []}
        granted |= set((token.get("fineGrained") or {}).get("global") or [])
        needed = {"repo.write", "discussion.write"} if to.create_pr else {"repo.write"}
        if not needed & granted:
            raise PublishError(
                f"{to.repo}: the fine-grained token of {who['name']} has no permission {' or '.join(sorted(needed))}. "
                f"Give it one at {api.endpoint}/settings/tokens."
            )
        names = [scope["entity"]["name"] for scope in scopes if "repo.write" in scope.get("permissions", [])]
        places = tuple(name if "/" in name else f"{name}/..." for name in names)
    return Account(str(who["name"]), places)


def check_repository(api: HfApi, to: Destination, account: Account) -> None:
    """Ask the Hub whether it would take files, as far as the repository exists; nothing is created.

    Raises:
        RefusedError: the repository differs from what the options say.
    """
    try:
        public = not api.model_info(to.repo).private
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if to.create_pr or (to.revision and to.revision.startswith("refs/")):
            raise RefusedError(
                f"{to.repo}: there is no such repository, so nothing can be proposed to it. "
                "Check the name, or leave out --create-pr and --revision refs/pr/N to create it."
            ) from error
        if not {to.repo, f"{to.repo.partition('/')[0]}/..."} & set(account.places):
            raise RefusedError(f"{to.repo}: {may_not_write(account)}") from error
        return
    if to.private and public:
        raise RefusedError(f"{to.repo}: exists and is public. Make it private in its settings, or leave out --private.")
    if to.revision and not _has_revision(api, to):
        if to.revision.startswith("refs/"):
            raise RefusedError(f"{to.repo}: there is no pull request {to.revision}. Open one with --create-pr.")
        return
    _probe(api, to)


def create_repository(api: HfApi, to: Destination, announce: Announce) -> None:
    """Create the repository and the branch where they are missing, and ask once more whether files would be taken."""
    try:
        api.model_info(to.repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(to.repo, private=to.private or None)  # else as its owner's settings say
        announce(f"{to.repo}: created{', private' if to.private else ''}")
    if to.revision and not _has_revision(api, to):
        api.create_branch(to.repo, branch=to.revision)
        announce(f"{to.repo}: created the branch {to.revision}")
    _probe(api, to)


def _has_revision(api: HfApi, to: Destination) -> bool:
    try:
        api.model_info(to.repo, revision=to.revision)
    except RevisionNotFoundError:
        return False
    return True


def _probe(api: HfApi, to: Destination) -> None:
    """Ask the Hub how it would take a file, without sending one; it refuses accounts that may not write."""
    probe = CommitOperationAdd("README.md", b"# \n")
    api.preupload_lfs_files(to.repo, [probe], revision=to.revision, create_pr=to.create_pr)
