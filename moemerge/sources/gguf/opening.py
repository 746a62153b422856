"""Open a model in GGUF as a folder of transformers: its small files are made of the GGUF file's settings."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from moemerge.checkpoint.disk import cache_folder, drafted
from moemerge.checkpoint.files import File
from moemerge.errors import OutputError, RefusedError
from moemerge.packages import need
from moemerge.sources.gguf.config import config_of
from moemerge.sources.gguf.stored_model import GgufModel, read_gguf
from moemerge.sources.model_folder import ModelFolder
from moemerge.sources.reference import Reference


def open_gguf(reference: str, origin: Path | Reference, files: Sequence[File]) -> ModelFolder:
    """Open a model in GGUF; of its files, the headers are read.

    Args:
        reference: the reference as the config writes it.
        origin: the file, folder or repository that it leads to.
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
    text = json.dumps(config, indent=2) + "\n"
    folder = _keep(model, {"config.json": text.encode()})
    opened = ModelFolder(reference, origin, folder, config, gguf=model)
    for file in files:
        if isinstance(file, Path):
            opened.seen(file)
    return opened


def _keep(model: GgufModel, files: Mapping[str, bytes]) -> Path:
    """Write the small files of a model into a folder of the user's cache, which is named after what they say."""
    cache = cache_folder("gguf")
    if cache is None:
        raise RefusedError(
            f"{model.reference}: its config.json is made in a folder of your cache, and you have none. Set "
            "XDG_CACHE_HOME to a folder."
        )
    made = hashlib.sha256(model.first.header + repr((sorted(files.items()), version("moemerge"))).encode())
    folder = cache / f"{model.first.path.name.rpartition('.')[0][:80]}-{made.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != content:
                with drafted(path) as draft:
                    draft.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}).") from error
    return folder
