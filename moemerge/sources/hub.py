"""Models on the Hub, through `huggingface_hub` and its cache; with `HF_HUB_OFFLINE=1` from the cache alone."""

import glob
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moemerge.checkpoint.index import (
    PICKLE_INDEX,
    SAFETENSORS_INDEX,
    SINGLE_PICKLE,
    SINGLE_SAFETENSORS,
    read_weight_map,
)
from moemerge.errors import SourceError
from moemerge.sources.local import resolve_file
from moemerge.sources.reference import Reference

# Everything that a merge reads or copies beside weights; tokenizers come in many files.
SMALL_FILES: Final = [
    "config.json", "generation_config.json", SAFETENSORS_INDEX, PICKLE_INDEX, "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "tekken.json", "chat_template.json", "*.jinja",
    "adapter_config.json",
]  # fmt: skip
_ABSENT: Final = (
    "there is no such folder here, it is not in the Hub's cache, and the Hub cannot be reached. "
    "Check the name, the network, and HF_HUB_OFFLINE."
)
_PARTIAL: Final = (
    "only a part of it is in the Hub's cache, and the Hub cannot be reached. Check the network and HF_HUB_OFFLINE."
)
_GATED: Final = "is gated. Accept its terms on its page on the Hub, then log in with `hf auth login`."
_NOT_FOUND: Final = (
    "there is no such folder here and no such repository on the Hub, or it is private. "
    "Check the name; for a private one log in with `hf auth login`."
)


def fetch_small_files(reference: Reference) -> Path:
    """Download all but the weights and give the snapshot's folder.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    with _explained(reference, _ABSENT):
        return Path(snapshot_download(reference.repo, revision=reference.revision, allow_patterns=SMALL_FILES))


def fetch_weights(reference: Reference, folder: Path, announce: Callable[[str], None]) -> None:
    """Download the weights into the snapshot `folder`, unless they are there: what its index names, or a single file.

    The snapshot is named by its commit, so that small files and weights are of one revision.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    choices = _weight_files(folder)
    if any(all((folder / name).exists() for name in names) for names in choices):
        return
    with _explained(reference, _PARTIAL):
        listing = HfApi().model_info(reference.repo, revision=folder.name).siblings or []
        on_hub = {file.rfilename for file in listing}
        for names in choices:
            if on_hub.issuperset(names):
                announce(f"{reference}: downloading {', '.join(names[:3])}{' ...' if names[3:] else ''}")
                patterns = [glob.escape(name) for name in names]
                snapshot_download(reference.repo, revision=folder.name, allow_patterns=patterns)
                return
    lost = [next(name for name in names if name not in on_hub) for names in choices]
    raise SourceError(
        f"{reference}: the repository has no {' and no '.join(lost)}, so it has no complete weights that moemerge can "
        "read."
    )


def _weight_files(folder: Path) -> list[list[str]]:
    """The files that may hold the weights, in the order in which `read_tensors` chooses."""

    def indexed(index: str) -> list[str]:
        return sorted(set(read_weight_map(resolve_file(folder, index)).values()))

    if (folder / SAFETENSORS_INDEX).exists():
        return [indexed(SAFETENSORS_INDEX)]
    return [[SINGLE_SAFETENSORS], indexed(PICKLE_INDEX) if (folder / PICKLE_INDEX).exists() else [SINGLE_PICKLE]]


@contextmanager
def _explained(reference: Reference, absent: str) -> Iterator[None]:
    """Turn whatever the client raises into a line for the user; its HTTP library differs between its versions."""
    try:
        yield
    except Exception as error:
        raise SourceError(f"{reference}: {_explain(error, reference, absent)}") from error


def _explain(error: BaseException, reference: Reference, absent: str) -> str:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return _explain(error.__cause__, reference, absent)  # the Hub did answer
    if isinstance(error, LocalEntryNotFoundError) or _is_of_network(error):
        # Newer clients raise IncompleteSnapshotError, which alone has this attribute.
        return _PARTIAL if hasattr(error, "snapshot_path") else absent
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {reference.revision or 'main'!r}."
    if isinstance(error, RepositoryNotFoundError):
        return _GATED if isinstance(error, GatedRepoError) else _NOT_FOUND
    if isinstance(error, HfHubHTTPError):
        said = f", {error.server_message.rstrip('.')}" if error.server_message else ""
        return f"the Hub answered with status {error.response.status_code}{said}. Try again later, or check your token."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"could not be downloaded: {lines[0].rstrip('.')}."


def _is_of_network(error: BaseException | None) -> bool:
    """Whether the network failed, or is not to be used: below every HTTP library lies an error of its socket."""
    while error and not isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None
