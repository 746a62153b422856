"""The tensors of a renamed model under the names of the dense model that it is, fused ones split while they are read.

No tensor is copied: parts of a fused tensor are ranges of its rows.
"""

import re
from collections.abc import Iterator
from typing import Final

import numpy as np

from moemerge.checkpoint.derived import Derived, Rows
from moemerge.checkpoint.disk import shown_bytes
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.joined import joined
from moemerge.checkpoint.unreadable import Resized, Unreadable
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import CheckpointError
from moemerge.families.dense.model import DenseModel
from moemerge.families.dense.renamed.family import Renamed
from moemerge.families.layer_names import layer_prefix

_LEAST_LENGTH: Final = np.float32(1e-12)  # torch.nn.functional.normalize


def plain_tensors(model: DenseModel, tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Rename the tensors of a renamed model, and split those that are fused.

    A tensor that has no other name keeps its own; the checks of a merge say whether it has a place.

    Args:
        model: what the model's `config.json` says; without a `renamed`, its tensors stay as they are.
        tensors: its tensors by their names in the files.

    Returns:
        The tensors by the names of `model.family`, and a note on what was done; none if nothing was.

    Raises:
        CheckpointError: a fused tensor has not the rows that its config says, or two tensors get one name.
    """
    renamed = model.renamed
    if renamed is None:
        return tensors, []
    named: dict[str, TensorInfo] = {}
    further = 0
    for name, tensor in tensors.items():
        if renamed.further and name.startswith(renamed.further):
            further += tensor.nbytes
            continue
        for plain, part in _plain(renamed, model, name, tensor):
            if plain in named:
                raise CheckpointError(f"{tensor.path}: tensor {name!r} and another one would both be called {plain!r}.")
            named[plain] = part
    note = f"its model_type {renamed.model_type} is read as {model.family.model_type}, without code of its own"
    if further:
        note += f"; {renamed.further}* ({shown_bytes(further)}), which predicts further tokens, is left out"
    head = named.get(model.family.head)
    if head and renamed.unit_head(model.released) and head.dtype in CONFIG_DTYPES:
        named[model.family.head] = _unit_rows(head)
        note += "; each row of its head is divided by its length (NormHead)"
    return named, ["; ".join((note, *renamed.notes(model.released)))]


def _plain(renamed: Renamed, model: DenseModel, name: str, tensor: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """Yield what a stored tensor is in the plain model: nothing for a buffer, several tensors for a fused one."""
    if name.endswith(renamed.buffers):
        return
    module, _, leaf = name.rpartition(".")
    inside = re.fullmatch(rf"{re.escape(renamed.layers)}(\d+)\.(.+)", module)
    if not inside:
        yield f"{renamed.outside.get(module, module)}.{leaf}" if module else name, tensor
        return
    prefix, own = layer_prefix(int(inside[1])), inside[2]
    if own not in renamed.fused:
        yield f"{prefix}{renamed.modules.get(own, own)}.{leaf}", tensor
        return
    parts = renamed.fused[own](model.sizes)
    if isinstance(tensor.path, Unreadable):
        yield from ((f"{prefix}{part}.{leaf}", tensor) for part in parts)
        return
    rows = sum(count for runs in parts.values() for _, count in runs)
    if tensor.shape[:1] != (rows,):
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} has the shape {list(tensor.shape)}, where config.json says {rows} rows "
            f"for {', '.join(part.rpartition('.')[2] for part in parts)}."
        )
    try:
        for part, runs in parts.items():
            plain = f"{prefix}{part}.{leaf}"
            yield plain, joined(plain, [tensor.rows(first, count) for first, count in runs])
    except ValueError as error:
        raise CheckpointError(f"{tensor.path}: tensor {name!r} cannot be split: {error}.") from error


def _unit_rows(tensor: TensorInfo) -> TensorInfo:
    if isinstance(tensor.path, Resized):
        return Resized(_unit_rows(tensor.path.stored), tensor.path.reason).tensor(tensor)
    if isinstance(tensor.path, Unreadable):
        return tensor
    return Derived("rows of length 1", (tensor,), _unit, "unit rows", tensor.dtype).tensor(tensor.name)


def _unit(_row: int, blocks: list[Rows]) -> Rows:
    rows = blocks[0]
    lengths: Rows = np.sqrt(np.square(rows).sum(1, keepdims=True, dtype=np.float32))
    return np.divide(rows, np.maximum(lengths, _LEAST_LENGTH), dtype=np.float32)
