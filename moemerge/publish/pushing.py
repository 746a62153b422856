"""Push a merged model's folder to the Hub, from the first check to the page's address."""

from collections.abc import Callable
from pathlib import Path

from moemerge.checkpoint.index import read_json
from moemerge.config.schema import CARD
from moemerge.errors import RefusedError
from moemerge.model_card.card import read_card
from moemerge.model_card.metadata import read_licence, set_licence
from moemerge.publish.folder import checkpoint_files
from moemerge.publish.publisher import Publisher
from moemerge.publish.repository import Repository, check_names


def push(
    folder: Path | str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    licence: str | None = None,
    overwrite: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> str:
    """Send a merged model to the Hub in one commit, where it replaces an older model's files.

    The token is that of `hf auth login`, or `HF_TOKEN`. Files that the Hub has already are not sent again.

    Args:
        folder: the folder of the merged model.
        repo: the repository, `user/name`; created where it is missing.
        private: whether a new repository is created private; then a public one is refused.
        revision: a branch, created where it is missing, or a pull request as `refs/pr/N`; else `main`.
        create_pr: whether to propose the model in a pull request.
        licence: the model's licence, as the Hub calls it, for the model card; None where the card names one.
        overwrite: whether to replace a model of another kind.
        announce: called with a line about each step.

    Returns:
        The address of the model's page, or of the pull request.

    Raises:
        SourceError: there is no such folder, or no checkpoint in it.
        CheckpointError: its files do not agree.
        RefusedError: no licence is named, the repository's name is none, or it holds a model of another kind.
        PublishError: the Hub does not take the model.
    """
    folder = Path(folder)
    repository = Repository(repo, private, revision, create_pr)
    # Before the Hub is asked for anything.
    check_names(repository)
    checkpoint_files(folder, lambda _: None)
    _check_card(folder, licence)
    publisher = Publisher(repository, announce)
    publisher.open()
    publisher.check_replaced(read_json(folder / "config.json").get("model_type"), overwrite=overwrite)
    publisher.create()
    if licence:
        set_licence(folder, licence)
    return publisher.push(folder)


def _check_card(folder: Path, licence: str | None) -> None:
    """Refuse a model without a licence, or one whose card cannot be read."""
    if not licence and not read_licence(folder):
        raise RefusedError(
            f"{folder / CARD}: names no licence, and nobody may use a model that has none. Name it with --license NAME."
        )
    if (folder / CARD).is_file():
        read_card(folder)
