"""The shards of a model that is changed: files whose bytes stay are kept, and only the others are written anew.

A tensor stays in the shard that it is in. Where the file system can share blocks, shards that are written anew are laid
out for that instead; see `checkpoint/extents.py`.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

from moemerge.checkpoint.extents import layout_to_share, shareable_starts, shared_bytes
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SINGLE_SAFETENSORS, build_index
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.shards import Shard, TensorSpec, build_shards, fill_shards

# Readers that look for files without the index, such as mlx-lm, take names that begin and end so.
_NAME: Final = "model-edit{edit}-{number:05d}.safetensors"
_EDITED: Final = re.compile(r"model-edit(\d+)-\d{5}\.safetensors")


@dataclass(frozen=True)
class ChangedShards:
    """The files of weights after a change."""

    kept: tuple[str, ...]
    """Names of the files that stay as they are."""
    written: tuple[Shard, ...]
    """Files to write, under names that no file in the folder has; routers are in the last."""
    removed: tuple[str, ...]
    """Names of the files that the model no longer consists of."""
    weight_map: Mapping[str, str]
    """Map from every tensor of the model to the name of its file."""
    tensor_bytes: int
    """Total size of all tensors in bytes, without headers."""
    shared_bytes: int
    """Bytes of the files to write that take no space, since the file system shares them with the old ones."""

    @property
    def index(self) -> str | None:
        """The text of the index, or None where one kept file holds everything, as its name says."""
        only = {*self.kept, *(shard.name for shard in self.written)}
        return None if only == {SINGLE_SAFETENSORS} else build_index(self.weight_map, self.tensor_bytes)

    @property
    def needed_bytes(self) -> int:
        """Space in bytes that the files to write take on the disk."""
        return sum(shard.nbytes for shard in self.written) - self.shared_bytes


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of the model that is changed."""

    folder: Path
    """The model's folder."""
    tensors: Mapping[str, TensorInfo]
    """Its tensors by name, from the headers of all its files of weights."""

    def by_file(self) -> dict[str, list[TensorInfo]]:
        """List the tensors of each file of weights by its name in the folder, in the order of their bytes."""
        names = {path.resolve(): path.name for path in self.folder.iterdir()}
        files: dict[str, list[TensorInfo]] = {}
        for tensor in self.tensors.values():
            files.setdefault(names[Path(str(tensor.path)).resolve()], []).append(tensor)
        return {name: sorted(files[name], key=lambda tensor: tensor.start) for name in sorted(files)}


def lay_out_changes(
    stored: StoredTensors,
    wanted: Sequence[TensorSpec],
    bands: Mapping[str, tuple[Band, ...]],
    *,
    last: Collection[str],
    max_shard_bytes: int,
) -> ChangedShards:
    """Decide which files of a model stay when it is changed, and which tensors are written into which new file.

    Args:
        stored: the model as it is.
        wanted: all tensors that it is to have, in their order.
        bands: what they are made of, by name; one that is missing is computed later.
        last: names of the tensors, routers, that get a last file of their own as soon as theirs is written anew.
        max_shard_bytes: upper bound of the tensor data in a new file; one that replaces an old file may be as large.
    """
    sources = {spec.name: source for spec in wanted if (source := _only_source(bands.get(spec.name, ())))}
    homes = _homes(stored, wanted, sources)
    kept: dict[str, list[str]] = {}
    groups: list[list[TensorSpec]] = []  # what is left of the other files
    files = stored.by_file()
    for file, held in files.items():
        at_home = [spec for tensor in held if (spec := homes.get(_place(tensor)))]
        whole = len(at_home) == len(held) and all(map(partial(_stays, sources), at_home, held))
        if whole and (file != SINGLE_SAFETENSORS or len(wanted) == len(held)):
            kept[file] = [spec.name for spec in at_home]
        else:
            groups.append([spec for spec in at_home if spec.name not in last])
    weight_map = {name: file for file, names in kept.items() for name in names}
    new = [spec for spec in wanted if spec.name not in weight_map]
    routers = [spec for spec in new if spec.name in last]
    starts = shareable_starts({spec.name: sources[spec.name] for spec in new if spec.name in sources}, stored.folder)
    if starts:
        shards = layout_to_share([spec for spec in new if spec.name not in last], starts, max_shard_bytes, routers)
    else:
        placed = {spec.name for group in groups for spec in group}
        others = [spec for spec in new if spec.name not in placed and spec.name not in last]
        groups += [*fill_shards(others, max_shard_bytes), *fill_shards(routers, max_shard_bytes)]
        shards = build_shards([(0, group) for group in groups if group])
    written = [replace(shard, name=name) for shard, name in zip(shards, _new_names(stored.folder), strict=False)]
    return ChangedShards(
        kept=tuple(kept),
        written=tuple(written),
        removed=tuple(file for file in files if file not in kept),
        weight_map=weight_map | {name: shard.name for shard in written for name in shard.starts},
        tensor_bytes=sum(spec.nbytes for spec in wanted),
        shared_bytes=shared_bytes(new, starts, written),
    )


def _homes(
    stored: StoredTensors, wanted: Sequence[TensorSpec], sources: Mapping[str, TensorInfo]
) -> dict[tuple[Path, int], TensorSpec]:
    """Give each tensor the place of the bytes that it is made of, or else that of the stored tensor of its name.

    Of two tensors that are made of the same bytes, the one that has them already goes first.
    """
    places = {_place(tensor): tensor for tensor in stored.tensors.values()}
    found = [(spec, places.get(_place(sources[spec.name]))) for spec in wanted if spec.name in sources]
    stays = [(spec, tensor) for spec, tensor in found if tensor and tensor.name == spec.name]
    named = [(spec, stored.tensors.get(spec.name)) for spec in wanted]
    homes: dict[tuple[Path, int], TensorSpec] = {}
    housed: set[str] = set()
    for spec, tensor in (*stays, *found, *named):
        if tensor and tensor.nbytes == spec.nbytes and spec.name not in housed and _place(tensor) not in homes:
            homes[_place(tensor)] = spec
            housed.add(spec.name)
    return homes


def _place(tensor: TensorInfo) -> tuple[Path, int]:
    return Path(str(tensor.path)), tensor.start


def _only_source(bands: tuple[Band, ...]) -> TensorInfo | None:
    """The one stored tensor whose bytes a tensor has unchanged; None for any other tensor."""
    match [piece for band in bands for piece in band]:
        case [piece] if isinstance(piece.source, TensorInfo) and piece.is_unchanged:
            return piece.source
    return None


def _stays(sources: Mapping[str, TensorInfo], spec: TensorSpec, tensor: TensorInfo) -> bool:
    """Whether a tensor is the stored one, with name, dtype, shape and bytes."""
    source = sources.get(spec.name)
    same = (spec.name, spec.dtype, spec.shape) == (tensor.name, tensor.dtype, tensor.shape)
    return same and source is not None and _place(source) == _place(tensor)


def _new_names(folder: Path) -> Iterator[str]:
    """Yield names for new files: a reader that is at work in the old ones finds none of them under an old name."""
    edits = [int(match[1]) for path in folder.iterdir() if (match := _EDITED.fullmatch(path.name))]
    return (_NAME.format(edit=max(edits, default=0) + 1, number=number) for number in count(1))
