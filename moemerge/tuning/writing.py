"""Gates put back into the shards that hold them: into copies beside, which then take the shards' places."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from moemerge.checkpoint.disk import flush, nearest_folder
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.staging import staged
from moemerge.dtypes import NAMED
from moemerge.errors import OutputError, RefusedError
from moemerge.evaluation.runnable import MixtureModel
from moemerge.sources import open_model, read_tensor_table

_CARD: Final = "README.md"


def gate_tensors(mixture: MixtureModel) -> dict[int, StoredTensor]:
    """By layer, where its gate is stored.

    Raises:
        RefusedError: it cannot be put back there.
    """
    table = read_tensor_table(open_model(str(mixture.folder.resolve()), lambda _: None), lambda _: None)
    for name, tensor in table.items():
        if tensor.dtype not in NAMED:
            raise RefusedError(
                f"{mixture.folder}: {name} is stored as {tensor.dtype}: a quantised model is not tuned. Tune the model "
                "that it was made from."
            )
    found = {layer: table[mixture.router(layer)] for layer in mixture.moe_layers}
    for tensor in found.values():
        if not isinstance(tensor.path, Path) or tensor.path.suffix == ".bin":
            raise RefusedError(
                f"{mixture.folder}: {tensor.name} is in {tensor.path}, a pickle: only *.safetensors are written to."
            )
    return found


def check_room(gates: Mapping[int, StoredTensor], folder: Path) -> None:
    """Refuse to start what the disk has no room to write.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    need = sum(path.stat().st_size for path in {Path(str(tensor.path)) for tensor in gates.values()})
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < need:
        raise OutputError(
            f"{folder}: writing tuned gates takes {need / 1e9:.2f} GB beside it for a while, but the disk has "
            f"{free / 1e9:.2f} GB free. Free some space, or write a copy to another disk with --out."
        )


def patch_shards(
    model: Path, gates: Mapping[int, StoredTensor], rows: Mapping[int, bytes], folder: Path
) -> list[str]:  # fmt: skip
    """Copy the shards that hold gates into `folder` with other bytes for these; gives their names.

    They are flushed to the disk.
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


def stage_replacement(  # noqa: PLR0917
    model: Path, gates: Mapping[int, StoredTensor], rows: Mapping[int, bytes], card: str | None, draft: Path,
    ready: Path,
) -> None:  # fmt: skip
    """Write what replaces files of a model; when `ready` appears, it is whole, and `replace_files` may begin."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    patch_shards(model, gates, rows, draft)
    if card is not None:
        (draft / _CARD).write_text(card, encoding="utf-8")
        flush(draft / _CARD)
    flush(draft)
    draft.rename(ready)
    flush(ready.parent)


def replace_files(ready: Path, model: Path) -> None:
    """Move what lies in `ready` into the model, a file at a time; after a crash the same call does what is left.

    Between two renames some layers have tuned gates and others not: any such mixture is a model that loads.
    """
    for path in sorted(ready.iterdir(), key=lambda path: (path.name == _CARD, path.name)):
        path.replace(model / path.name)
    flush(model)
    ready.rmdir()


def write_copy(
    model: Path, gates: Mapping[int, StoredTensor], rows: Mapping[int, bytes], card: str | None, copy: Path
) -> None:  # fmt: skip
    """Write a whole model with other gates; shards without any are linked where the file system can.

    Raises:
        RefusedError: `copy` is not empty.
        OutputError: it cannot be written.
    """
    with staged(copy, [model.resolve()]) as stage:
        patched = patch_shards(model, gates, rows, stage)
        for path in model.iterdir():
            if path.is_dir() or path.name in patched:
                continue
            if path.suffix != ".safetensors" or not _link(path.resolve(), stage / path.name):
                shutil.copyfile(path, stage / path.name)
        if card is not None:
            (stage / _CARD).write_text(card, encoding="utf-8")


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True
