"""Open a model in GGUF as a folder of transformers, in the user's cache: its small files are made of the settings."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moemerge.checkpoint.disk import cache_folder, drafted
from moemerge.checkpoint.files import File
from moemerge.errors import OutputError, RefusedError
from moemerge.packages import need
from moemerge.sources.gguf.choosing import find_ggufs, find_in_store, find_on_hub
from moemerge.sources.gguf.config import config_of
from moemerge.sources.gguf.stored_model import GgufModel, read_gguf
from moemerge.sources.gguf.tokenizer import tokenizer_config, tokenizer_json
from moemerge.sources.local import resolve_file
from moemerge.sources.model_folder import Announce, ModelFolder
from moemerge.sources.reference import Reference

if TYPE_CHECKING:
    from moemerge.sources.stores import StoreFolder

_TOKENIZER: Final = "tokenizer.json"
_CARD: Final = "README.md"


def open_if_gguf(
    reference: str, origin: "Path | Reference | StoreFolder", folder: Path, announce: Announce
) -> ModelFolder | None:
    """Open a model in GGUF; None for a model with other weights. Elsewhere, the weights stay there.

    Args:
        reference: the reference as the config writes it.
        origin: the file, folder, repository or place in a store that it leads to.
        folder: the file or folder; of a repository, the folder of its small files in the Hub's cache.
        announce: called with a line about each step that takes long.

    Raises:
        NoSuchModelError: there is no such file, or there are several. See `open_gguf` for other errors.
    """
    if not isinstance(origin, Reference):
        files = _files_in(reference, origin, folder, announce)
        return open_gguf(reference, origin, files) if files else None
    if not origin.gguf and "gguf" not in origin.repo.lower() and (folder / "config.json").exists():
        return None
    from moemerge.sources import hub
    from moemerge.sources.ranges import NoRangesError

    names = find_on_hub(reference, origin.gguf, hub.list_files(origin, folder, announce))
    if not names:
        return None
    announce(f"{reference}: reading the headers of {len(names)} file(s) on the Hub")
    try:
        opened = open_gguf(reference, origin, hub.open_remote(origin, folder, names, announce))
    except NoRangesError as error:
        announce(f"{error}".replace("Run without --stream.", "All of it is downloaded."))
        hub.fetch_files(origin, folder, names, announce)
        opened = open_gguf(reference, origin, hub.open_remote(origin, folder, names, announce))
    card = folder / _CARD
    if card.is_file():
        _keep(opened.folder, {_CARD: card.read_text(encoding="utf-8", errors="replace")})
    return replace(opened, gguf=opened.gguf and replace(opened.gguf, snapshot=folder, names=tuple(names)))


def _files_in(reference: str, origin: "Path | StoreFolder", folder: Path, announce: Announce) -> Sequence[File]:
    """The GGUF files that a reference to a folder or a store leads to; none where it has other weights."""
    if isinstance(origin, Path):
        return find_ggufs(reference, folder)
    from moemerge.sources.store_files import StoreFile

    return [StoreFile(origin, name, announce) for name in find_in_store(reference, origin.gguf, origin.files)]


def weights_here(model: GgufModel, origin: "Path | Reference | StoreFolder", announce: Announce) -> GgufModel:
    """Download those of a model's files that are on the Hub, and read all from the cache.

    Raises:
        SourceError: the Hub does not give a file.
        CheckpointError: a file is damaged.
    """
    if model.snapshot is None or not isinstance(origin, Reference):
        return model
    from moemerge.sources import hub

    missing = [name for name in model.names if not (model.snapshot / name).exists()]
    if missing:
        announce(f"{model.reference}: downloading {', '.join(missing[:3])}{' ...' if missing[3:] else ''}")
        hub.fetch_files(origin, model.snapshot, missing, announce)
    return read_gguf(model.reference, [resolve_file(model.snapshot, name) for name in model.names])


def open_gguf(reference: str, origin: "Path | Reference | StoreFolder", files: Sequence[File]) -> ModelFolder:
    """Open a model in GGUF; of its files, the headers are read.

    Args:
        reference: the reference as the config writes it.
        origin: the file, folder, repository or place in a store that it leads to.
        files: the file, or the files that it is split into.

    Raises:
        NoSuchModelError: its family is not read.
        SourceError: a file cannot be read.
        CheckpointError: a file is damaged.
        RefusedError: the package gguf is not installed, or there is no folder for small files.
        OutputError: the folder for small files cannot be written.
    """
    model = read_gguf(reference, files)
    config = config_of(model)
    if model.kinds:
        need("gguf", f"To read {reference}, which is quantised")
    files_made = {"config.json": config, "tokenizer_config.json": tokenizer_config(model.first)}
    folder = _folder_for(model)
    _keep(folder, {name: json.dumps(table, indent=2) + "\n" for name, table in files_made.items()})
    opened = ModelFolder(reference, origin, folder, config, gguf=model)
    for file in files:
        if isinstance(file, Path):
            opened.seen(file)
    return opened


def add_tokenizer(model: ModelFolder) -> str:
    """Add the tokenizer to the small files of a model in GGUF, which an expert does without.

    One of a kind that is not read is taken from a `tokenizer.json` beside the GGUF file, if there is one.

    Returns:
        What is wrong with its tokenizer, as it follows the word, and what to do; empty where nothing is.

    Raises:
        OutputError: the folder for small files cannot be written.
        CheckpointError: the `tokenizer.json` beside the file cannot be read.
    """
    if model.gguf is None:
        return ""
    file = model.gguf.first.path
    try:
        text = tokenizer_json(model.gguf.first)
    except ValueError as error:
        if not (isinstance(file, Path) and os.path.lexists(file.with_name(_TOKENIZER))):
            return f"{error}: put its {_TOKENIZER} beside {file}"
        text = resolve_file(file.parent, _TOKENIZER).read_text(encoding="utf-8")
        model.notes.append(f"{model.reference}: its tokenizer is the {_TOKENIZER} beside it, since its own {error}")
    _keep(model.folder, {_TOKENIZER: text})
    return ""


def _folder_for(model: GgufModel) -> Path:
    """The folder for the small files of a model, which is named after what they are made of, and the model's place.

    Tables of tensors are found by this folder, and fine-tunes of one model may have equal headers.
    """
    cache = cache_folder("gguf")
    if cache is None:
        raise RefusedError(
            f"{model.reference}: its config.json is made in a folder of your cache, and you have none. Set "
            "XDG_CACHE_HOME to a folder."
        )
    names = repr([(str(file.path), sorted(file.tensors.items())) for file in model.files])
    made = hashlib.sha256(model.first.header + names.encode() + version("moemerge").encode())
    return cache / f"{model.first.path.name.rpartition('.')[0][:80]}-{made.hexdigest()[:16]}"


def _keep(folder: Path, files: Mapping[str, str]) -> None:
    """Write small files, unless they are there already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path, content = folder / name, text.encode()
            if not path.is_file() or path.read_bytes() != content:
                with drafted(path) as draft:
                    draft.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}).") from error
