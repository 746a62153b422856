"""Find files in a model's folder and follow their links; in the Hub's cache no further than that cache."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.index import Weights, choose_weights, read_weight_map
from moemerge.errors import CheckpointError
from moemerge.file_kinds import POINTER_BEGINNING

_MOST_POINTER_BYTES: Final = 1024


def resolve_file(folder: Path, name: str) -> Path:
    """Find the file `folder/name` and check where its link leads; the path keeps the name, not a blob's hash.

    In a folder that a user made, links are the user's and may lead anywhere. A snapshot in the Hub's cache is a folder
    of links into the cache's blobs; nothing in it may lead elsewhere: a link to a private file would be copied into the
    merged model. Only a regular file is ever opened: reading a pipe would wait for it.

    Raises:
        CheckpointError: there is no such file, it is no regular file, cannot be read, or is a pointer of git-lfs, or
            its link leads out of the cache.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a ring of links, before Python 3.13
        raise CheckpointError(f"{path}: there is no such file, or it is a link that leads nowhere.") from error
    if not target.is_file():
        raise CheckpointError(f"{path}: is not a regular file.")
    try:
        is_pointer = target.stat().st_size < _MOST_POINTER_BYTES and target.read_bytes().startswith(POINTER_BEGINNING)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    if is_pointer:
        raise CheckpointError(f"{path}: is a git-lfs pointer in place of the file. Run `git lfs pull` in {folder}.")
    root = folder.resolve()
    if is_snapshot(root) and leads_out(root, target):
        raise CheckpointError(
            f"{path}: is a link to {target}, out of the Hub's cache that it lies in. Download the model again."
        )
    return path


def leads_out(folder: Path, target: Path) -> bool:
    """Whether a file lies outside both a resolved folder and, if that is a snapshot, the blobs that belong to it."""
    return folder not in target.parents and not _is_blob_of(folder, target)


def is_snapshot(folder: Path) -> bool:
    """Whether a resolved folder is one commit of a repository in the Hub's cache."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith(("models--", "datasets--"))


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


def weights_named(config: Mapping[str, Any]) -> str:
    """The weight file or index that a `config.json` names; empty where it names none.

    Raises:
        CheckpointError: the value is no safetensors file beside `config.json`.
    """
    named = config.get("transformers_weights")
    if named is None:
        return ""
    if not isinstance(named, str) or not re.fullmatch(r"[^/\\\0:]+\.safetensors(\.index\.json)?", named):
        raise CheckpointError(
            f"config.json: transformers_weights is {named!r:.80}, where a safetensors file beside it is expected."
        )
    return named


def find_weights(
    folder: Path, names: Collection[str], named: str = "", seen: Callable[[Path], Path] = lambda path: path
) -> tuple[Weights, Callable[[str], dict[str, str]]]:
    """Find the files of a folder that hold the weights, and a function that reads their index.

    Args:
        folder: the model's folder.
        names: names of the folder's files; weights need not be there yet.
        named: see `choose_weights`.
        seen: called with the index before it is read.

    Raises:
        CheckpointError: an index or a shard is damaged or not there.
    """

    def read_map(index: str) -> dict[str, str]:
        return read_weight_map(seen(resolve_file(folder, index)))

    there = {name for name in names if not (folder / name).exists() or (folder / name).is_file()}
    return choose_weights(there, lambda index: read_map(index).values(), named), read_map
