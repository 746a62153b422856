"""Models on the Hub, read through `huggingface_hub` and its cache; with `HF_HUB_OFFLINE=1` from the cache alone."""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from moemerge.checkpoint.header import TensorInfo
from moemerge.errors import SourceError
from moemerge.sources.local import resolve_file
from moemerge.sources.ranges import HubFile, NoRangesError
from moemerge.sources.reference import Reference
from moemerge.sources.remote_weights import SMALL_FILES, choose_files, tensors_of, weight_files
from moemerge.sources.retries import ABSENT, PARTIAL, explained, patiently


def fetch_small_files(reference: Reference, announce: Callable[[str], None], *, also: Sequence[str] = ()) -> Path:
    """Download everything but the weights; returns the snapshot's folder, which is named after the commit.

    Args:
        reference: the repository.
        announce: called with a line about each step that takes long.
        also: names of other files to download.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    with explained(reference, ABSENT):
        return Path(
            patiently(
                reference,
                announce,
                lambda: snapshot_download(
                    reference.repo, revision=reference.revision, allow_patterns=[*SMALL_FILES, *also]
                ),
            )
        )


def holds_weights(folder: Path) -> bool:
    """Whether the weights are in the cache, beside a snapshot's small files."""
    return any(all((folder / name).exists() for name in names) for names in weight_files(folder))


def fetch_weights(reference: Reference, folder: Path, announce: Callable[[str], None]) -> None:
    """Download the weights into the snapshot `folder`: what its index names, or a single file.

    The snapshot is named after its commit, so that small files and weights are of one revision.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    names = _find_weights(reference, folder, announce)
    announce(f"{reference}: downloading {', '.join(names[:3])}{' ...' if names[3:] else ''}")
    fetch_files(reference, folder, names, announce)


def fetch_files(reference: Reference, folder: Path, names: Sequence[str], announce: Callable[[str], None]) -> None:
    """Download those of the named files that the repository has into the snapshot `folder`.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    patterns = [glob.escape(name) for name in names]
    with explained(reference, PARTIAL):
        patiently(
            reference,
            announce,
            lambda: snapshot_download(reference.repo, revision=folder.name, allow_patterns=patterns),
        )


def list_files(reference: Reference, folder: Path, announce: Callable[[str], None]) -> list[str]:
    """List a repository's files at the commit of the snapshot `folder`; without network, those that are in it.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    if constants.HF_HUB_OFFLINE:
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    with explained(reference, PARTIAL):
        info = patiently(reference, announce, lambda: HfApi().model_info(reference.repo, revision=folder.name))
    return [file.rfilename for file in info.siblings or []]


def open_remote(
    reference: Reference, folder: Path, names: Sequence[str], announce: Callable[[str], None]
) -> list[Path | HubFile]:
    """Open files at the commit of the snapshot `folder`: those that are not in it stay on the Hub.

    Raises:
        SourceError: the Hub does not give a file, or no parts of it.
    """
    return [
        resolve_file(folder, name) if (folder / name).exists() else HubFile(reference, folder.name, name, announce)
        for name in names
    ]


def read_remote_tensors(
    reference: Reference, folder: Path, announce: Callable[[str], None]
) -> tuple[dict[str, TensorInfo], list[str]] | None:
    """Read the table of a model's tensors from headers by byte ranges, with notes on what is odd; None if that fails.

    Pickles cannot be read by ranges, and not every proxy lets parts of a file through.

    Raises:
        SourceError: says what the Hub answered and what to do.
        CheckpointError: index and headers disagree, or a file is damaged.
    """
    names = _find_weights(reference, folder, announce)
    if any(name.endswith(".bin") for name in names):
        return None
    announce(f"{reference}: reading the headers of {len(names)} file(s) on the Hub")

    try:
        return tensors_of(folder, names, lambda name: HubFile(reference, folder.name, name, announce))
    except NoRangesError as error:
        announce(f"{error}".replace("Run without --stream.", "All of it is downloaded."))
        return None


def cache_folder() -> Path:
    """The folder of the Hub's cache; it need not exist."""
    return Path(constants.HF_HUB_CACHE)


def _find_weights(reference: Reference, folder: Path, announce: Callable[[str], None]) -> list[str]:
    """The files with the weights in a repository, at the commit of the snapshot `folder`."""
    names = list_files(reference, folder, announce)
    if constants.HF_HUB_OFFLINE and not any(set(names).issuperset(files) for files in weight_files(folder)):
        raise SourceError(f"{reference}: {PARTIAL}")
    return choose_files(f"{reference}: the repository", folder, names)
