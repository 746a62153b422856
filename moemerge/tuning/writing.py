"""Write gates back into copies of the shards that hold them, in which only their byte ranges differ."""

import os
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

CARD: Final = "README.md"


def gate_tensors(mixture: MixtureModel) -> dict[int, TensorInfo]:
    """Find where each layer's gate is stored.

    Raises:
        RefusedError: a gate cannot be written back there.
    """
    for name, tensor in mixture.tensors.items():
        if tensor.dtype not in CONFIG_DTYPES:
            raise RefusedError(
                f"{mixture.folder}: {name} is stored as {tensor.dtype}: a quantised model is not tuned. Tune the model "
                "that it was made from."
            )
    found = {layer: mixture.tensors[mixture.router(layer)] for layer in mixture.moe_layers}
    for tensor in found.values():
        if not isinstance(tensor.path, Path) or tensor.path.suffix == ".bin":
            raise RefusedError(
                f"{mixture.folder}: {tensor.name} is in {tensor.path}, a pickle: only *.safetensors are written to."
            )
    return found


def shard_stamps(gates: Mapping[int, TensorInfo]) -> dict[str, list[int]]:
    """Stamps of the shards that hold gates, by name: see `stamp`."""
    shards = sorted({Path(str(tensor.path)) for tensor in gates.values()})
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


def check_room(mixture: MixtureModel, copy: Path | None) -> None:
    """Refuse to start if the disk has too little space.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    folder = nearest_folder(copy or mixture.folder)
    linked = folder.stat().st_dev == mixture.folder.stat().st_dev
    tensors = gate_tensors(mixture) if linked else mixture.tensors
    need = sum(path.stat().st_size for path in {Path(str(tensor.path)) for tensor in tensors.values()})
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{copy or mixture.folder}: writing tuned gates takes {shown_bytes(need)} "
            f"{'beside it for a while' if copy is None else 'there'}, but the disk has {shown_bytes(free)} free. Free "
            "some space, or write a copy to another disk with --out."
        )


def patch_shards(model: Path, gates: Mapping[int, TensorInfo], rows: Mapping[int, bytes], folder: Path) -> list[str]:
    """Copy the shards that hold gates into `folder` with other gates, flushed to the disk; returns their names.

    Raises:
        ValueError: a gate has another number of bytes than is stored.
    """
    names = {path.resolve(): path.name for path in model.iterdir()}
    by_shard: dict[Path, list[int]] = {}
    for layer, tensor in gates.items():
        by_shard.setdefault(Path(str(tensor.path)).resolve(), []).append(layer)
    for shard, layers in by_shard.items():
        copy = folder / names[shard]
        shutil.copyfile(shard, copy)
        with copy.open("r+b") as file:
            for layer in layers:
                if len(rows[layer]) != gates[layer].nbytes:
                    raise ValueError(f"{gates[layer].name}: {len(rows[layer])} bytes for {gates[layer].nbytes}")
                file.seek(gates[layer].start)
                file.write(rows[layer])
        flush(copy)
    return [names[shard] for shard in by_shard]


def write_copy(
    model: Path, gates: Mapping[int, TensorInfo], rows: Mapping[int, bytes], card: str | None, copy: Path
) -> None:
    """Write a whole model with other gates; shards without any are linked where the file system can.

    Raises:
        RefusedError: `copy` is not empty.
        OutputError: the copy cannot be written.
    """
    with staged(copy, [model.resolve()]) as stage:
        patched = patch_shards(model, gates, rows, stage)
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
