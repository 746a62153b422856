"""Data sets on the Hub, streamed by `datasets` at one commit: a bounded number of rows, none kept on the disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any, Final

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from moemerge.errors import MoemergeError, RefusedError, SourceError
from moemerge.printable import printable
from moemerge.sources.data_sets import HubData
from moemerge.sources.retries import is_of_network, page_of, patiently

MOST_ROWS: Final = 2000
"""Rows that are read of a data set at most."""


@cache
def commit_of(data: HubData) -> str:
    """The commit that a data set's revision names; it is asked for once, so that everything is read at one commit.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    with _explained(data, SourceError):
        info = patiently(
            data, lambda _line: None, lambda: HfApi().dataset_info(data.repo, revision=data.revision, expand=["sha"])
        )
        return str(info.sha)


def hub_rows(data: HubData) -> Iterator[tuple[str, Any]]:
    """Stream the first rows of a data set, or the named column of each; each comes with its place, for messages.

    Raises:
        SourceError: the Hub cannot be reached, or does not give it.
        RefusedError: it has no such subset, split or column, or `datasets` cannot read it.
    """
    commit = commit_of(data)
    with _explained(data, RefusedError):
        from datasets import load_dataset

        rows = load_dataset(data.repo, data.subset, split=data.split, revision=commit, streaming=True)
        for number, row in enumerate(islice(rows, MOST_ROWS), 1):
            if data.column and data.column not in row:
                raise RefusedError(f"{data}: has no column {data.column!r}; it has {', '.join(map(str, row))}.")
            # Messages may stand in a column of any name.
            value = row[data.column] if data.column else row
            yield f"{data}, row {number}", {"messages": value} if isinstance(value, list) else value


@contextmanager
def _explained(data: HubData, otherwise: type[MoemergeError]) -> Iterator[None]:
    """Turn what the Hub's client or `datasets` raises into a message: of the network, or of another kind."""
    try:
        yield
    except MoemergeError:
        raise
    except Exception as error:
        raise (SourceError if is_of_network(error) else otherwise)(f"{data}: {_why(data, error)}") from error


def _why(data: HubData, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"is gated. Accept its terms on {page_of(f'datasets/{data.repo}')}, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"the data set has no revision {data.revision or 'main'!r}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such data set on the Hub, or it is private. Check the name; for a private one log in with "
            "`hf auth login`."
        )
    if is_of_network(error):
        return "the Hub cannot be reached. Check the network and HF_HUB_OFFLINE, or name files on this machine."
    said = " ".join(printable(str(error)).split()) or type(error).__name__
    return f"cannot be read: {said.rstrip('.'):.300}."
