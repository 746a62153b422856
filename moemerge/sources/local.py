"""Files of a model's folder, with links followed no further than the cache that the folder belongs to."""

import re
from pathlib import Path

from moemerge.errors import CheckpointError


def resolve_file(folder: Path, name: str) -> Path:
    """The file `folder/name`, after a look at where its link leads; the path keeps the name, not a blob's hash.

    A snapshot in the Hub's cache is a folder of links into the cache's blobs; nothing else may lead outside: a link to
    a private file would be copied into the merged model.

    Raises:
        CheckpointError: there is no such file, or the link leads elsewhere.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a ring of links, before Python 3.13
        raise CheckpointError(f"{path}: there is no such file, or it is a link that leads nowhere.") from error
    if not target.is_file():
        raise CheckpointError(f"{path}: is not a file.")
    root = folder.resolve()
    if root not in target.parents and not _is_blob_of(root, target):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside the model's folder. Copy or hard-link the file instead."
        )
    return path


def _is_blob_of(snapshot: Path, file: Path) -> bool:
    """Whether a file outside a folder is a blob that a snapshot's links may lead to.

    `models--user--name/snapshots/COMMIT/file` leads to `models--user--name/blobs/HASH`; huggingface_hub 2.4 makes that
    a link to `blobs/HA/HASH`, which all repositories of the cache share.
    """
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots":
        return False
    shared = file.parent.parent == repository.parent / "blobs" and re.fullmatch(r"[0-9a-f]{64}", file.name) is not None
    return shared or file.parent == repository / "blobs"
