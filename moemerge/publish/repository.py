"""A repository on the Hub that a model is sent to, and checks before any work that the Hub will take it."""

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
class Repository:
    """A repository on the Hub and how a model is sent there."""

    name: str
    """`user/name`, or `organisation/name`."""
    private: bool = False
    """Whether a new repository is created private; then a public one is refused."""
    revision: str | None = None
    """A branch, created where it is missing, or a pull request as `refs/pr/N`; None for `main`."""
    create_pr: bool = False
    """Whether the model is proposed in a new pull request."""


@dataclass(frozen=True)
class Account:
    """The account that a token belongs to."""

    name: str
    places: tuple[str, ...]
    """Where the account may write, as far as the Hub says: repositories, and namespaces as `user/...`."""


def may_not_write(account: Account, why: str = "") -> str:
    """Make the message for an account that may not write to a repository, with what the Hub said in `why`."""
    places = " or ".join(account.places) or "nothing"
    return f"{account.name} may not write there{why}. The token may write to {places}."


def check_names(repo: Repository) -> None:
    """Refuse a name or options that cannot be right, without asking the Hub.

    Raises:
        RefusedError: says what is wrong with the name or the options.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo.name, re.ASCII):
        raise RefusedError(f"{repo.name}: is not a repository's name. Write user/name, or organisation/name.")
    if repo.create_pr and repo.revision:
        raise RefusedError(
            "--create-pr, --revision: give one of them, not both; an open pull request is --revision refs/pr/N."
        )
    if repo.revision and re.fullmatch(r"[0-9a-f]{40}", repo.revision):
        raise RefusedError(f"--revision: {repo.revision} is a commit, which cannot change. Name a branch.")
    if repo.revision and repo.revision.startswith("refs/") and not _PULL_REQUEST.fullmatch(repo.revision):
        raise RefusedError(f"--revision: {repo.revision!r} is not a branch. Write its name alone, or refs/pr/N.")


def read_account(api: HfApi, repo: Repository) -> Account:
    """Find the account of the token, if the token may write at all.

    Raises:
        PublishError: the token can only read.
    """
    who: dict[str, Any] = api.whoami()
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise PublishError(
            f"{repo.name}: the token of {who['name']} may only read. Make one that may write at "
            f"{api.endpoint}/settings/tokens, and log in with `hf auth login`, or set HF_TOKEN."
        )
    writing = [org["name"] for org in who.get("orgs") or [] if org.get("roleInOrg") in _WRITING_ROLES]
    places = tuple(f"{namespace}/..." for namespace in (who["name"], *writing))
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        granted = {permission for scope in scopes for permission in scope.get("permissions") or []}
        granted |= set((token.get("fineGrained") or {}).get("global") or [])
        needed = {"repo.write", "discussion.write"} if repo.create_pr else {"repo.write"}
        if not needed & granted:
            raise PublishError(
                f"{repo.name}: the fine-grained token of {who['name']} has no permission "
                f"{' or '.join(sorted(needed))}. Give it one at {api.endpoint}/settings/tokens."
            )
        names = [scope["entity"]["name"] for scope in scopes if "repo.write" in scope.get("permissions", [])]
        places = tuple(name if "/" in name else f"{name}/..." for name in names)
    return Account(str(who["name"]), places)


def check_repository(api: HfApi, repo: Repository, account: Account) -> None:
    """Ask the Hub whether it would take files, as far as the repository exists; nothing is created.

    Raises:
        RefusedError: the repository differs from what the options say.
    """
    try:
        public = not api.model_info(repo.name).private
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if repo.create_pr or (repo.revision and repo.revision.startswith("refs/")):
            raise RefusedError(
                f"{repo.name}: there is no such repository, so nothing can be proposed to it. "
                "Check the name, or leave out --create-pr and --revision refs/pr/N to create it."
            ) from error
        if not {repo.name, f"{repo.name.partition('/')[0]}/..."} & set(account.places):
            raise RefusedError(f"{repo.name}: {may_not_write(account)}") from error
        return
    if repo.private and public:
        raise RefusedError(
            f"{repo.name}: exists and is public. Make it private in its settings, or leave out --private."
        )
    if repo.revision and not _has_revision(api, repo):
        if repo.revision.startswith("refs/"):
            raise RefusedError(f"{repo.name}: there is no pull request {repo.revision}. Open one with --create-pr.")
        return
    _probe(api, repo)


def create_repository(api: HfApi, repo: Repository, announce: Announce) -> None:
    """Create the repository and the branch where they are missing, and ask once more whether files would be taken."""
    try:
        api.model_info(repo.name)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(repo.name, private=repo.private or None)  # else as its owner's settings say
        announce(f"{repo.name}: created{', private' if repo.private else ''}")
    if repo.revision and not _has_revision(api, repo):
        api.create_branch(repo.name, branch=repo.revision)
        announce(f"{repo.name}: created the branch {repo.revision}")
    _probe(api, repo)


def _has_revision(api: HfApi, repo: Repository) -> bool:
    try:
        api.model_info(repo.name, revision=repo.revision)
    except RevisionNotFoundError:
        return False
    return True


def _probe(api: HfApi, repo: Repository) -> None:
    """Ask the Hub how it would take a file, without sending one; it refuses accounts that may not write."""
    probe = CommitOperationAdd("README.md", b"# \n")
    api.preupload_lfs_files(repo.name, [probe], revision=repo.revision, create_pr=repo.create_pr)
