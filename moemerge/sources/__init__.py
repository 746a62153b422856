"""From a model reference in the YAML to its `config.json` and the table of its tensors; no tensor bytes are read."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.index import read_json, read_tensors
from moemerge.errors import SourceError
from moemerge.sources.local import resolve_file
from moemerge.sources.pickles import read_pickle
from moemerge.sources.reference import Reference, parse_reference

__all__ = ["Announce", "ModelFolder", "Reference", "open_model", "parse_reference", "read_tensor_table"]

Announce = Callable[[str], None]
"""Called with one line about what is being done, for a user who waits."""


@dataclass(frozen=True)
class ModelFolder:
    """A model's small files: enough to refuse it, before any weights are downloaded."""

    reference: str
    """As the config names it."""
    origin: Path | Reference
    folder: Path
    config: dict[str, Any]
    """Its `config.json`."""

    def file(self, name: str) -> Path | None:
        """The file of this name in the model's folder, or None where there is none.

        Raises:
            CheckpointError: it is a link that leads elsewhere, or nowhere.
        """
        return resolve_file(self.folder, name) if os.path.lexists(self.folder / name) else None


def open_model(reference: str, announce: Announce) -> ModelFolder:
    """Find a model and read its `config.json`; of a Hub model only the small files are downloaded.

    Raises:
        SourceError: the reference leads nowhere, or to no model.
        CheckpointError: its `config.json` is damaged.
    """
    origin = parse_reference(reference)
    if isinstance(origin, Reference):
        from moemerge.sources.hub import fetch_small_files

        announce(f"{reference}: looking it up on the Hub")
        folder = fetch_small_files(origin)
    else:
        folder = origin
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise SourceError(f"{reference}: is a LoRA adapter, not a model. Merge it into its base model first.")
        raise SourceError(f"{reference}: has no config.json, so it is not a model that moemerge can read.")
    return ModelFolder(reference, origin, folder, read_json(resolve_file(folder, "config.json")))


def read_tensor_table(model: ModelFolder, announce: Announce) -> dict[str, StoredTensor]:
    """Every tensor of a model, from headers alone; a Hub model's weights are downloaded where they are not cached.

    Raises:
        SourceError: the Hub does not give the weights.
        CheckpointError: the model's files are damaged or incomplete.
    """
    if isinstance(model.origin, Reference):
        from moemerge.sources.hub import fetch_weights

        fetch_weights(model.origin, model.folder, announce)
    return read_tensors(model.folder, lambda name: resolve_file(model.folder, name), read_pickle)
