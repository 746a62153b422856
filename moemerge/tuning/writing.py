"""Write trained tensors back into copies of the shards that hold them, in which only their byte ranges differ."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Final

from moemerge.checkpoint.disk import flush, nearest_folder, shown_bytes
from moemerge.checkpoint.files import Stamp
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.staging import staged
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import OutputError, RefusedError
from moemerge.evaluation.runnable import MixtureModel
from moemerge.tuning.settings import Trained

CARD: Final = "README.md"
# Norms between the blocks of a layer and after all layers, not those of queries and keys or within a block.
_NORM: Final = re.compile(r"model\.(layers\.\d+\.)?\w*norm\w*\.weight")


def trained_tensors(mixture: MixtureModel, train: Trained) -> dict[str, TensorInfo]:
    """Find where the tensors that are trained are stored, by name: gates, in the order of layers, then norms.

    Raises:
        RefusedError: a tensor cannot be written back there.
    """
    for name, tensor in mixture.tensors.items():
        if tensor.dtype not in CONFIG_DTYPES:
            raise RefusedError(
                f"{mixture.folder}: {name} is stored as {tensor.dtype}: a quantised model is not tuned. Tune the model "
                "that it was made from."
            )
    names = [mixture.router(layer) for layer in mixture.moe_layers]
    if train == "gates,norms":
        names += [name for name in mixture.tensors if _NORM.fullmatch(name)]
    found = {name: mixture.tensors[name] for name in names}
    for tensor in found.values():
        if not isinstance(tensor.path, Path) or tensor.path.suffix == ".bin":
            raise RefusedError(
                f"{mixture.folder}: {tensor.name} is in {tensor.path}, a pickle: only *.safetensors are written to."
            )
    return found


def shard_stamps(tensors: Mapping[str, TensorInfo]) -> dict[str, list[int]]:
    """Stamps of the shards that hold these tensors, by name: see `stamp`."""
    shards = sorted({Path(str(tensor.path)) for tensor in tensors.values()})
    return {path.name: list(astuple(Stamp.of(path))) for path in shards}


def stamp(path: Path) -> list[int]:
    """Size in bytes, time of writing and inode of a file, which a renaming keeps; an empty list if there is no file."""
    if not path.exists():
        return []
    found = Stamp.of(path)
    return [found.size, found.modified, found.inode]


def check_writable(folder: Path) -> None:
    """Refuse a model whose files cannot be replaced, before anything is computed.

    Raises:
        OutputError: the system does not let them be replaced; says why.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written to ({error.strerror}). Write a copy elsewhere with --out."
        ) from error


def check_room(mixture: MixtureModel, trained: Mapping[str, TensorInfo], copy: Path | None) -> None:
    """Refuse to start if the disk has too little space for the shards that hold the trained tensors.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    folder = nearest_folder(copy or mixture.folder)
    linked = folder.stat().st_dev == mixture.folder.stat().st_dev
    tensors = trained if linked else mixture.tensors
    need = sum(path.stat().st_size for path in {Path(str(tensor.path)) for tensor in tensors.values()})
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{copy or mixture.folder}: writing what is tuned takes {shown_bytes(need)} "
            f"{'beside it for a while' if copy is None else 'there'}, but the disk has {shown_bytes(free)} free. Free "
            "some space, or write a copy to another disk with --out."
        )


def patch_shards(
    model: Path, tensors: Mapping[str, TensorInfo], values: Mapping[str, bytes], folder: Path
) -> list[str]:
    """Copy the shards that hold tensors into `folder` with other values, flushed to the disk; returns their names.

    Raises:
        ValueError: a tensor has another number of bytes than is stored.
    """
    names = {path.resolve(): path.name for path in model.iterdir()}
    by_shard: dict[Path, list[tuple[str, TensorInfo]]] = {}
    for name, tensor in tensors.items():
        by_shard.setdefault(Path(str(tensor.path)).resolve(), []).append((name, tensor))
    for shard, held in by_shard.items():
        copy = folder / names[shard]
        shutil.copyfile(shard, copy)
        with copy.open("r+b") as file:
            for name, tensor in held:
                if len(values[name]) != tensor.nbytes:
                    raise ValueError(f"{name}: {len(values[name])} bytes for {tensor.nbytes}")
                file.seek(tensor.start)
                file.write(values[name])
        flush(copy)
    return [names[shard] for shard in by_shard]


def write_copy(
    model: Path, tensors: Mapping[str, TensorInfo], values: Mapping[str, bytes], card: str | None, copy: Path
) -> None:
    """Write a whole model with other values of some tensors; shards without any are linked if the file system can.

    Raises:
        RefusedError: `copy` is not empty.
        OutputError: the copy cannot be written.
    """
    with staged(copy, [model.resolve()]) as stage:
        patched = patch_shards(model, tensors, values, stage)
        for path in model.iterdir():
            if path.name in patched or path.name.startswith(".moemerge"):
                continue
            if path.is_dir():
                if not path.name.startswith("."):  # caches, and what tools keep of versions
                    shutil.copytree(path, stage / path.name)
            elif path.suffix != ".safetensors" or not _link(path.resolve(), stage / path.name):
                shutil.copyfile(path, stage / path.name)
        if card is not None:
            (stage / CARD).write_text(card, encoding="utf-8")


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True
