"""Models on the Hub, through `huggingface_hub` and its cache; with `HF_HUB_OFFLINE=1` from the cache alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
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
    "config.json", "generation_config.json", "*.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "adapter_config.json",
]  # fmt: skip


def fetch_small_files(reference: Reference) -> Path:
    """Download all but the weights and give the snapshot's folder.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    return _download(reference, reference.revision, SMALL_FILES)


def fetch_weights(reference: Reference, folder: Path, announce: Callable[[str], None]) -> None:
    """Download the weights into the snapshot `folder`: the files that its index names, or the single file.

    The snapshot is named by its commit, so that small files and weights are of one revision.

    Raises:
        SourceError: says what the Hub answered and what to do.
    """
    for index, single in ((SAFETENSORS_INDEX, SINGLE_SAFETENSORS), (PICKLE_INDEX, SINGLE_PICKLE)):
        if (folder / index).exists():
            names = sorted(set(read_weight_map(resolve_file(folder, index)).values()))
        else:
            names = [single]
        if not all((folder / name).exists() for name in names):
            announce(f"{reference}: downloading {', '.join(names[:3])}{' ...' if names[3:] else ''}")
            _download(reference, folder.name, names)
        if (folder / names[0]).exists():
            return
    raise SourceError(
        f"{reference}: has no weights that moemerge can read: expected {SINGLE_SAFETENSORS}, {SAFETENSORS_INDEX}, "
        f"{SINGLE_PICKLE} or {PICKLE_INDEX}. With HF_HUB_OFFLINE=1 they have to be in the cache."
    )


def _download(reference: Reference, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(reference.repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise SourceError(
            f"{reference}: is gated. Accept its terms on its page on the Hub, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{reference}: there is no such folder here and no such repository on the Hub, or it is private. "
            "Check the name; for a private one log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{reference}: the repository has no revision {reference.revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{reference}: there is no such folder here, it is not in the Hub's cache, and the Hub cannot be reached. "
            "Check the name, the network, and HF_HUB_OFFLINE."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(f"{reference}: the Hub could not be asked: {str(error).splitlines()[0]}") from error
