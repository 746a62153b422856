"""From a model reference in the YAML to its `config.json` and the table of its tensors; no tensor bytes are read."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal

from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.disk import nearest_folder
from moemerge.checkpoint.files import File, Stamp, size_of
from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checkpoint.index import read_json, read_tensors
from moemerge.errors import SourceError
from moemerge.sources.local import find_weights, is_snapshot, resolve_file, weights_named
from moemerge.sources.lora import CONFIG as ADAPTER_CONFIG
from moemerge.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from moemerge.sources.lora import Adapter, merge_adapter, open_adapter
from moemerge.sources.names import unwrapped
from moemerge.sources.pickles import read_pickle
from moemerge.sources.reference import Reference, parse_reference, split_adapter

__all__ = [
    "Announce",
    "ModelFolder",
    "Reference",
    "fetch_files",
    "fetch_if_room",
    "open_merged",
    "open_model",
    "parse_reference",
    "read_tensor_table",
    "read_tensor_tables",
]

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
    adapters: tuple[Adapter, ...] = ()
    """Which are added to its weights, in this order."""
    stamps: dict[Path, Stamp] = field(default_factory=dict, compare=False)
    """Of each of its files that was read, what told it from others when it was first read."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What is odd about its files."""

    @property
    def folders(self) -> list[Path]:
        """Its own and its adapters'; of a snapshot in the Hub's cache, that of its repository."""
        folders = [self.folder, *(adapter.folder for adapter in self.adapters)]
        return [folder.parent.parent if is_snapshot(folder) else folder for folder in folders]

    def name_of(self, file: File) -> str:
        """Which reference one of its weight files belongs to: an adapter's, or that of the model before the `+`."""
        for adapter in self.adapters:
            if isinstance(file, Path) and adapter.folder in file.parents:
                return adapter.reference
        return self.reference.removesuffix("".join(f"+{adapter.reference}" for adapter in self.adapters))

    def file(self, name: str) -> Path | None:
        """The file of this name in the model's folder, or None where there is none.

        Raises:
            CheckpointError: it is a link that leads elsewhere, or nowhere.
        """
        return self.seen(resolve_file(self.folder, name)) if os.path.lexists(self.folder / name) else None

    def seen(self, path: Path) -> Path:
        """The same path, once the stamp of that file is kept."""
        if path not in self.stamps:
            self.stamps[path] = Stamp.of(path)
        return path


def open_model(reference: str, announce: Announce) -> ModelFolder:
    """Find a model and read its `config.json`; of a Hub model only the small files are downloaded.

    Raises:
        SourceError: the reference leads nowhere, or to no model.
        CheckpointError: its `config.json` is damaged.
    """
    if split := split_adapter(reference):
        model, adapter = split
        opened = open_model(model, announce)
        _, folder = _find(adapter, announce, also=ADAPTER_WEIGHTS)
        config = folder / ADAPTER_CONFIG
        opened.stamps.update({config: Stamp.of(config)} if config.is_file() else {})
        return replace(opened, reference=reference, adapters=(*opened.adapters, open_adapter(adapter, folder)))
    origin, folder = _find(reference, announce)
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise SourceError(
                f"{reference}: is a LoRA adapter, not a model. Write it after its base model: model+adapter."
            )
        raise SourceError(f"{reference}: has no config.json, so it is not a model that moemerge can read.")
    path = resolve_file(folder, "config.json")
    stamp = Stamp.of(path)
    opened = ModelFolder(reference, origin, folder, read_json(path), stamps={path: stamp})
    if (folder / "adapter_config.json").is_file():
        opened.notes.append(
            f"{reference}: has an adapter_config.json beside its own weights, which are read; where peft is "
            "installed, transformers would load the adapter too. To merge both, write model+adapter"
        )
    return opened


def open_merged(out: Path | str) -> ModelFolder:
    """The merged checkpoint in a folder, never one on the Hub.

    Raises:
        SourceError: there is no such folder, or no checkpoint in it.
        CheckpointError: its `config.json` is damaged.
    """
    if not Path(out).is_dir():
        found = "is a file" if Path(out).is_file() else "there is no such folder"
        raise SourceError(f"{out}: {found}. Name the folder that holds the merged model.")
    return open_model(str(Path(out).resolve()), lambda _: None)


def _find(reference: str, announce: Announce, *, also: Sequence[str] = ()) -> tuple[Path | Reference, Path]:
    """What a reference means, and the folder with its small files and those that are named."""
    origin = parse_reference(reference)
    if not isinstance(origin, Reference):
        return origin, origin
    from moemerge.sources.hub import fetch_small_files

    announce(f"{reference}: looking it up on the Hub")
    return origin, fetch_small_files(origin, announce, also=also)


def fetch_files(model: ModelFolder, names: Sequence[str], announce: Announce) -> dict[str, Path]:
    """Those of a model's small files that are there, by name; of a Hub model, those that are missing are downloaded.

    Raises:
        SourceError: the Hub does not give them.
        CheckpointError: a file is a link that leads elsewhere.
    """
    missing = [name for name in names if not model.file(name)]
    if missing and isinstance(model.origin, Reference):
        from moemerge.sources import hub

        hub.fetch_files(model.origin, model.folder, missing, announce)
    return {name: path for name in names if (path := model.file(name))}


def read_tensor_table(
    model: ModelFolder, announce: Announce, *, weights: Literal["download", "stream"] = "download"
) -> dict[str, TensorInfo]:
    """Every tensor of a model, from headers alone; with adapters, as they are with what these add.

    Args:
        model: the model.
        announce: called with a line about what takes long.
        weights: of a Hub model that is not in the cache: whether they are downloaded into it, or stay where they are to
            be read by ranges. Pickles are always downloaded.

    Raises:
        SourceError: the Hub does not give the weights.
        CheckpointError: the model's files are damaged or incomplete.
    """
    (tensors,) = read_tensor_tables([model], announce, weights=weights)
    return tensors


def read_tensor_tables(
    models: Iterable[ModelFolder], announce: Announce, *, weights: Literal["download", "stream"] = "download",
    dense: bool = False,
) -> list[dict[str, TensorInfo]]:  # fmt: skip
    """The same of several models; what is one model with several adapters is read once.

    Args:
        models: the models.
        announce: see `read_tensor_table`.
        weights: see `read_tensor_table`.
        dense: whether they are dense models, whose tensors are then called as transformers calls them, whatever they
            were wrapped in when they were saved.

    Raises:
        SourceError: see `read_tensor_table`.
        CheckpointError: see `read_tensor_table`.
    """
    read: dict[Path, dict[str, TensorInfo]] = {}
    tables = []
    for model in models:
        if model.folder not in read:
            found = _read_weights(model, announce, weights)
            read[model.folder] = unwrapped(found, partial(_noted, model)) if dense else found
        tensors = read[model.folder]
        for adapter in model.adapters:
            for path in (adapter.folder / name for name in ADAPTER_WEIGHTS):
                if path.is_file():
                    model.seen(path)
            tensors = merge_adapter(adapter, tensors)
        tables.append(tensors)
    return tables


def _read_weights(
    model: ModelFolder, announce: Announce, weights: Literal["download", "stream"]
) -> dict[str, TensorInfo]:  # fmt: skip
    named = weights_named(model.config)
    if isinstance(model.origin, Reference):
        from moemerge.sources.hub import fetch_weights, holds_weights, read_remote_tensors

        if named:
            raise SourceError(
                f"{model.reference}: its config.json names {named} as the file of its weights, which is read from a "
                "folder alone. Download the repository, and name the folder."
            )
        if not holds_weights(model.folder):
            if weights == "stream" and (found := read_remote_tensors(model.origin, model.folder, announce)) is not None:
                return _noted(model, found[1], found[0])
            fetch_weights(model.origin, model.folder, announce)

    def read_headers(names: Sequence[str]) -> Iterator[dict[str, TensorInfo]]:
        for name in names:
            path = model.seen(resolve_file(model.folder, name))
            yield read_pickle(path) if name.endswith(".bin") else read_header(path)

    paths = list(model.folder.iterdir())
    names = {path.name for path in paths if path.is_file()}
    chosen, read_map = find_weights(model.folder, names, named, model.seen)
    if not chosen.files:  # it may be a link that leads nowhere that should hold them, which is said then
        names = {path.name for path in paths}
        chosen, read_map = find_weights(model.folder, names, named, model.seen)
    tensors, notes = read_tensors(model.folder, chosen, names, read_map, read_headers)
    return _noted(model, notes, tensors)


def _noted(model: ModelFolder, notes: Sequence[str], tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    named = [f"{model.reference}: {note}" for note in notes]
    model.notes.extend(
        note for note in named if note not in model.notes
    )  # it may be read twice: streamed, then downloaded
    return tensors


def fetch_if_room(
    models: Mapping[str, ModelFolder], tables: Mapping[str, dict[str, TensorInfo]], *,
    beside: tuple[Path | None, int], announce: Announce,
) -> dict[str, dict[str, TensorInfo]]:  # fmt: skip
    """Download the weights of those models that are on the Hub, if the cache's disk has room for all of them.

    Args:
        models: by reference.
        tables: of their tensors.
        beside: a folder, and how many bytes will be written there at the same time.
        announce: called with a line about what takes long.

    Returns:
        The tables of what was downloaded, by reference.

    Raises:
        SourceError: the Hub does not give the weights.
        CheckpointError: a model's files are damaged or incomplete.
    """
    files = {
        reference: {leaf.path for tensor in table.values() for leaf in leaves(tensor)}
        for reference, table in tables.items()
    }
    remote = {reference: found for reference, found in files.items() if not all(isinstance(f, Path) for f in found)}
    if not remote:
        return {}
    from moemerge.sources.hub import cache_folder

    cache, (folder, written_bytes) = nearest_folder(cache_folder()), beside
    needed = sum(size_of(file) for file in set().union(*remote.values()) if not isinstance(file, Path))
    if folder and nearest_folder(folder).stat().st_dev == cache.stat().st_dev:
        needed += written_bytes
    room = disk_usage(cache).free
    if room < needed:
        announce(
            f"the disk of the Hub's cache has {room / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB would be needed: "
            "weights are streamed from the Hub, as with --stream"
        )
        return {}
    read = read_tensor_tables([models[reference] for reference in remote], announce, dense=True)
    return dict(zip(remote, read, strict=True))
