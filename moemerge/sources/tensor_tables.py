"""The tables of models' tensors, from headers alone: every tensor by the name that transformers gives it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checkpoint.index import read_tensors
from moemerge.errors import CheckpointError, DamagedModelError, SourceError
from moemerge.families.dense import plain_tensors, read_dense
from moemerge.sources.bin_files import read_pickle
from moemerge.sources.local import find_weights, resolve_file, weights_named
from moemerge.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from moemerge.sources.lora import merge_adapter
from moemerge.sources.model_folder import Announce, ModelFolder
from moemerge.sources.quantised.table import dequantised
from moemerge.sources.reference import Reference
from moemerge.sources.text_models import text_tensors

if TYPE_CHECKING:
    from moemerge.sources.gguf.stored_model import GgufModel


def read_tensor_table(
    model: ModelFolder,
    announce: Announce,
    *,
    weights: Literal["download", "stream"] = "download",
    whole: bool = False,
) -> dict[str, TensorInfo]:
    """Read the table of every tensor of a model from headers alone; adapters are added to it.

    Args:
        model: the model whose tensors are read.
        announce: called with a line about each step that takes long.
        weights: whether the weights of a Hub model that is not in the cache are downloaded into it, or stay on the Hub
            to be read by ranges. Pickles are always downloaded. Weights in an object store always stay there.
        whole: whether all tensors of a multimodal model are read, by their stored names, and not its text model's.

    Raises:
        SourceError: the Hub does not give the weights.
        DamagedModelError: the model's files are damaged or incomplete.
    """
    (tensors,) = read_tensor_tables([replace(model, whole=None) if whole else model], announce, weights=weights)
    return tensors


def read_tensor_tables(
    models: Iterable[ModelFolder],
    announce: Announce,
    *,
    weights: Literal["download", "stream"] = "download",
    dense: bool = False,
) -> list[dict[str, TensorInfo]]:
    """Read the tensor tables of several models; a model that comes with several adapters is read once.

    Args:
        models: the models whose tensors are read.
        announce: see `read_tensor_table`.
        weights: see `read_tensor_table`.
        dense: whether they are dense models, whose tensors are then renamed to transformers' names, whatever the models
            were wrapped in when they were saved, and dequantised.

    Raises:
        SourceError: see `read_tensor_table`.
        CheckpointError: see `read_tensor_table`.
    """
    read: dict[tuple[Path, Any], tuple[dict[str, TensorInfo], dict[str, TensorInfo]]] = {}
    tables = []
    for model in models:
        key = (model.folder, model.mixture and model.expert)
        if key not in read:
            try:
                found = _read_weights(model, announce, weights)
            except CheckpointError as error:
                raise _damaged(model, error) from error
            others: dict[str, TensorInfo] = {}
            if dense or model.whole:
                found, others = text_tensors(model.whole, found, partial(_noted, model))
            if dense:
                found, others = dequantised(model.config, found), dequantised(model.config, others)
            read[key] = found, others
        tensors, others = read[key]
        model.left_out.update(others)
        for adapter in model.adapters:
            for path in (adapter.folder / name for name in ADAPTER_WEIGHTS):
                if path.is_file():
                    model.seen(path)
            tensors = merge_adapter(adapter, tensors)
        tables.append(_plain(model, tensors) if dense else tensors)
    return tables


def _damaged(model: ModelFolder, error: CheckpointError) -> DamagedModelError:
    """The error of a model, which its message names."""
    text = str(error)
    named = any(part in text for part in (model.reference, str(model.folder)))
    return DamagedModelError(model.reference, text if named else f"{model.reference}: {text}")


def _plain(model: ModelFolder, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Give the tensors of a model whose type is read as another the names of that one."""
    read = read_dense(model.config)
    if isinstance(read, str):
        return tensors
    plain, notes = plain_tensors(read, tensors)
    return _noted(model, notes, plain)


def _read_weights(
    model: ModelFolder, announce: Announce, weights: Literal["download", "stream"]
) -> dict[str, TensorInfo]:
    if model.mixture:
        from moemerge.sources.mixture_experts import expert_tensors

        return expert_tensors(model.mixture, model.expert, announce, weights)
    if model.gguf:
        return _read_gguf(model, model.gguf, announce, weights)
    named = weights_named(model.config)
    if not isinstance(model.origin, Path) and (read := _read_remote(model, named, announce, weights)):
        return _noted(model, read[1], read[0])

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


def _read_remote(
    model: ModelFolder, named: str, announce: Announce, weights: Literal["download", "stream"]
) -> tuple[dict[str, TensorInfo], list[str]] | None:
    """Read the weights of a model that stay elsewhere, with notes; None where they are in its folder here now."""
    if named:
        raise SourceError(
            f"{model.reference}: its config.json names {named} as the file of its weights, which is read from a folder "
            "here alone. Download the model, and name the folder."
        )
    if not isinstance(model.origin, Path | Reference):
        from moemerge.sources.store_files import read_store_tensors

        return read_store_tensors(model.origin, model.folder, announce)
    if isinstance(model.origin, Reference):
        from moemerge.sources.hub import fetch_weights, holds_weights, read_remote_tensors

        if not holds_weights(model.folder):
            if weights == "stream" and (found := read_remote_tensors(model.origin, model.folder, announce)) is not None:
                return found
            fetch_weights(model.origin, model.folder, announce)
    return None


def _read_gguf(
    model: ModelFolder, gguf: "GgufModel", announce: Announce, weights: Literal["download", "stream"]
) -> dict[str, TensorInfo]:
    from moemerge.sources.gguf.opening import weights_here

    read = gguf if weights == "stream" else weights_here(gguf, model.origin, announce)
    for path in (file.path for file in read.files):
        if isinstance(path, Path):  # it may be downloaded only now
            model.seen(path)
    return read.tensors()


def _noted(model: ModelFolder, notes: Sequence[str], tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    named = [f"{model.reference}: {note}" for note in notes]
    model.notes.extend(
        note for note in named if note not in model.notes
    )  # it may be read twice: streamed, then downloaded
    return tensors
