"""Copies that take neither time nor space: files share the blocks of their sources where the file system can.

Such a file system (btrfs, XFS, bcachefs) shares whole blocks. A tensor can be shared only if it begins equally far into
a block in both files. Tensors of a file follow each other without holes, so that a shard has one choice: the offset at
which its data begin, which its header's padding decides. Tensors that need the same offset go into the same shard.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

from moemerge.checkpoint.disk import nearest_folder
from moemerge.checkpoint.header import ALIGNMENT_BYTES, BLOCK_BYTES, TensorInfo
from moemerge.checkpoint.shards import Shard, TensorSpec, build_shards, fill_shards

# Bytes that are not worth a shard of their own.
SMALL_TENSOR_BYTES: Final = 2**20
SMALL_SHARD_BYTES: Final = 2**26
_FICLONERANGE: Final = 0x4020940D  # linux/fs.h, with struct file_clone_range


def shares_extents(source: Path, folder: Path) -> bool:
    """Try whether a file in `folder`, or in the nearest folder above that exists, can share blocks of `source`."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return False
    parent = nearest_folder(folder)
    with suppress(OSError), source.open("rb") as file, TemporaryFile(dir=parent, prefix=".moemerge-") as probe:
        if os.fstat(file.fileno()).st_dev == os.fstat(probe.fileno()).st_dev:
            fcntl.ioctl(probe, _FICLONERANGE, struct.pack("qQQQ", file.fileno(), 0, BLOCK_BYTES, 0))
            return True
    return False


def shareable_starts(sources: Mapping[str, TensorInfo], folder: Path) -> dict[str, int]:
    """Offsets in their files of the tensors whose blocks can be shared with files in `folder`, by name."""
    paths = {path for source in sources.values() if isinstance(path := source.path, Path)}
    shared = {path for path in paths if shares_extents(path, folder)}
    return {name: source.start for name, source in sources.items() if source.path in shared}


def layout_to_share(
    tensors: Sequence[TensorSpec], starts: Mapping[str, int], max_shard_bytes: int, last: Sequence[TensorSpec] = ()
) -> list[Shard]:
    """Divide tensors into shards in which copied ones lie in their blocks as in their source files.

    Args:
        tensors: what to write.
        starts: offsets in the source files, for the tensors whose bytes are copied.
        max_shard_bytes: upper bound of the tensor data in one shard.
        last: what to write into shards of their own after the others.

    Returns:
        Shards of shared tensors first, then shards of the others in their order: computed ones and those that are too
        small. The shards of the `last` tensors follow.
    """
    groups: list[tuple[int, list[TensorSpec]]] = []  # where in a block the data begin, and what they are
    growing: dict[int, int] = {}  # where in a block a group ends, to its index
    for tensor in tensors:
        start = starts.get(tensor.name)
        if start is None or start % ALIGNMENT_BYTES or tensor.nbytes < SMALL_TENSOR_BYTES:
            continue
        phase = start % BLOCK_BYTES
        index = growing.pop(phase, None)
        if index is None or _nbytes(groups[index][1]) + tensor.nbytes > max_shard_bytes:
            index = len(groups)
            groups.append((phase or BLOCK_BYTES, []))
        groups[index][1].append(tensor)
        growing[(phase + tensor.nbytes) % BLOCK_BYTES] = index
    shared = [(phase, group) for phase, group in groups if _nbytes(group) >= SMALL_SHARD_BYTES]
    names = {tensor.name for _, group in shared for tensor in group}
    others = [tensor for tensor in tensors if tensor.name not in names]
    unshared = [*fill_shards(others, max_shard_bytes), *fill_shards(last, max_shard_bytes)]
    return build_shards([*shared, *((0, group) for group in unshared)])


def shared_bytes(tensors: Sequence[TensorSpec], starts: Mapping[str, int], shards: Sequence[Shard]) -> int:
    """How many bytes of the shards take no space where the file system shares blocks with the sources'."""
    total = 0
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    for shard in shards:
        for name, place in shard.starts.items():
            start = starts.get(name)
            if start is not None and (start - place) % BLOCK_BYTES == 0:
                total += max(0, (place + sizes[name]) // BLOCK_BYTES - -(-place // BLOCK_BYTES)) * BLOCK_BYTES
    return total


def _nbytes(tensors: Sequence[TensorSpec]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
