"""Open models: from a reference in the YAML to `config.json`; their tensors are listed by `tensor_tables.py`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from moemerge.checkpoint.files import File, Stamp
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import read_json
from moemerge.errors import NoSuchModelError, RefusedError
from moemerge.sources.local import is_snapshot, resolve_file
from moemerge.sources.lora import CONFIG as ADAPTER_CONFIG
from moemerge.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from moemerge.sources.lora import Adapter, open_adapter
from moemerge.sources.reference import (
    Location,
    Reference,
    location_of,
    parse_reference,
    split_adapter,
    split_expert,
    wrong_address,
)
from moemerge.sources.text_models import read_text_config
from moemerge.sources.wrong_names import check_merged_folder, no_model

if TYPE_CHECKING:
    from moemerge.sources.gguf.stored_model import GgufModel
    from moemerge.sources.stores import StoreFolder

__all__ = [
    "Announce",
    "ModelFolder",
    "Reference",
    "fetch_files",
    "open_merged",
    "open_model",
    "parse_reference",
]

Announce = Callable[[str], None]
"""Called with one line about the work being done, for a user who waits."""
LOOKING_UP: Final = "looking it up on the Hub"
"""The end of the line that is announced when a model on the Hub is opened."""
LOOKING_UP_STORE: Final = "looking it up in its store"
"""The end of the line that is announced when a model in an object store is opened."""


@dataclass(frozen=True)
class ModelFolder:
    """A model's small files: enough to refuse it before any weights are downloaded."""

    reference: str
    """The reference as the config writes it."""
    origin: "Path | Reference | StoreFolder"
    folder: Path
    config: dict[str, Any]
    """The model's `config.json`; of a multimodal model, that of the text model inside."""
    adapters: tuple[Adapter, ...] = ()
    """Adapters that are added to its weights, in this order."""
    stamps: dict[Path, Stamp] = field(default_factory=dict, compare=False)
    """The stamp of each of its files when it was first read, to notice files that change later."""
    notes: list[str] = field(default_factory=list, compare=False)
    """Notes on what is odd about its files."""
    mixture: "ModelFolder | None" = None
    """The mixture whose expert it is, if it is one; its files are the mixture's."""
    expert: int | Literal["shared"] = "shared"
    """The expert of `mixture` that it is."""
    whole: dict[str, Any] | None = None
    """The `config.json` of the multimodal model that it is the text model of, if it is one."""
    left_out: dict[str, TensorInfo] = field(default_factory=dict, compare=False)
    """Tensors that are no part of a text model, by the names that transformers gives them, once they have been read."""
    gguf: "GgufModel | None" = field(default=None, repr=False, compare=False)
    """The model in GGUF that its small files are made of, if it is one."""

    @property
    def own_folders(self) -> tuple[Path, ...]:
        """The model's folder and its adapters'."""
        return (self.folder, *(adapter.folder for adapter in self.adapters))

    @property
    def stored_type(self) -> str:
        """The `model_type` that its `config.json` names."""
        return str((self.whole or self.config).get("model_type"))

    @property
    def folders(self) -> list[Path]:
        """As `own_folders`; for a snapshot in the Hub's cache, the folder of its repository."""
        return [folder.parent.parent if is_snapshot(folder) else folder for folder in self.own_folders]

    def name_of(self, file: File) -> str:
        """The reference that one of its weight files belongs to: an adapter's, or that of the model before the `+`."""
        for adapter in self.adapters:
            if isinstance(file, Path) and adapter.folder in file.parents:
                return adapter.reference
        return self.reference.removesuffix("".join(f"+{adapter.reference}" for adapter in self.adapters))

    def file(self, name: str) -> Path | None:
        """The file of this name in the model's folder; None where there is none.

        Raises:
            CheckpointError: the file is a link that leads elsewhere, or nowhere.
        """
        return self.seen(resolve_file(self.folder, name)) if os.path.lexists(self.folder / name) else None

    def seen(self, path: Path) -> Path:
        """Keep the stamp of a file and return its path."""
        if path not in self.stamps:
            self.stamps[path] = Stamp.of(path)
        return path


def open_model(reference: str, announce: Announce) -> ModelFolder:
    """Find a model and read its `config.json`; of a model elsewhere only the small files are downloaded.

    `MIXTURE#NAME` is opened as the dense model that the expert is; the headers of the mixture's weights are read.

    Raises:
        SourceError: the reference leads nowhere, or to no model.
        IncompatibleError: it is an expert that no dense model computes like; lists every reason.
        CheckpointError: its `config.json` is damaged, or for an expert the mixture's weights.
    """
    if split := split_adapter(reference):
        model, adapter = split
        if split_expert(adapter):
            raise NoSuchModelError(f"{reference}: an adapter has no experts; write MIXTURE#EXPERT+ADAPTER.")
        opened = open_model(model, announce)
        _, folder = _find(adapter, announce, also=ADAPTER_WEIGHTS)
        config = folder / ADAPTER_CONFIG
        opened.stamps.update({config: Stamp.of(config)} if config.is_file() else {})
        return replace(opened, reference=reference, adapters=(*opened.adapters, open_adapter(adapter, folder)))
    if chosen := split_expert(reference):
        from moemerge.sources.mixture_experts import open_expert

        return open_expert(reference, *chosen, announce)
    origin, folder = _find(reference, announce)
    from moemerge.sources.gguf.opening import open_if_gguf

    if gguf := open_if_gguf(reference, origin, folder, announce):
        return gguf
    if not (folder / "config.json").exists():
        raise no_model(reference, folder)
    path = resolve_file(folder, "config.json")
    stamp = Stamp.of(path)
    opened = ModelFolder(reference, origin, folder, read_json(path), stamps={path: stamp})
    text, whole = read_text_config(opened.config, opened.file)
    opened = replace(opened, config=text, whole=whole)
    if (folder / "adapter_config.json").is_file():
        opened.notes.append(
            f"{reference}: has an adapter_config.json beside its own weights, which are read; where peft is "
            "installed, transformers would load the adapter too. To merge both, write model+adapter"
        )
    return opened


def open_merged(out: Path | str, *, in_stores: bool = False) -> ModelFolder:
    """Open the merged checkpoint in a folder; a name on the Hub is not looked up.

    Args:
        out: the folder.
        in_stores: whether it may be in an object store, too.

    Raises:
        RefusedError: it is in an object store, and may not be.
        SourceError: there is no such folder, or no checkpoint in it.
        CheckpointError: its `config.json` is damaged.
    """
    if (wrong := wrong_address(out)) and not Path(out).is_dir():
        raise NoSuchModelError(wrong)
    if location := location_of(out):
        if not in_stores:
            raise RefusedError(f"{location}: is in an object store. Copy the model to a folder here, and name that.")
        return open_model(str(location), lambda _: None)
    check_merged_folder(out)
    return open_model(str(Path(out).resolve()), lambda _: None)


def _find(
    reference: str, announce: Announce, *, also: Sequence[str] = ()
) -> "tuple[Path | Reference | StoreFolder, Path]":
    """Resolve a reference, and give the folder with its small files and those that are named."""
    origin = parse_reference(reference)
    if isinstance(origin, Path):
        return origin, origin
    if isinstance(origin, Location):
        from moemerge.sources import store_files

        announce(f"{reference}: {LOOKING_UP_STORE}")
        return store_files.fetch_small_files(origin, also=also)
    from moemerge.sources.hub import fetch_small_files

    announce(f"{reference}: {LOOKING_UP}")
    return origin, fetch_small_files(origin, announce, also=also)


def fetch_files(model: ModelFolder, names: Sequence[str], announce: Announce) -> dict[str, Path]:
    """Find those of the named small files that a model has, by name; missing ones of a model elsewhere are downloaded.

    Raises:
        SourceError: the Hub, or the store, does not give them.
        CheckpointError: a file is a link that leads elsewhere.
    """
    missing = [name for name in names if not model.file(name)]
    if missing and isinstance(model.origin, Reference):
        from moemerge.sources import hub

        hub.fetch_files(model.origin, model.folder, missing, announce)
    elif missing and not isinstance(model.origin, Path | Reference):
        from moemerge.sources import store_files

        store_files.fetch(model.origin, model.folder, missing)
    return {name: path for name in names if (path := model.file(name))}
