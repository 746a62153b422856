"""The last step of a plan: decide which file each output tensor is in, and where its bytes begin."""

from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint.extents import layout_to_share, shared_bytes, shares_extents
from moemerge.checkpoint.shards import Shard, TensorSpec, layout_shards
from moemerge.dtypes import HEADER_DTYPES, bytes_of
from moemerge.planning.assembled import Assembled
from moemerge.planning.options import PlanOptions
from moemerge.planning.output import Computed


@dataclass(frozen=True)
class Layout:
    """The files of weights in the output."""

    shards: tuple[Shard, ...]
    shared_bytes: int
    """Bytes that take no space on the disk, since the file system shares them with the sources."""


def lay_out(assembled: Assembled, options: PlanOptions) -> Layout:
    """Divide the tensors into files, laid out so that blocks can be shared with the sources where that is possible.

    Routers have a small last file of their own, so that whoever changes only them writes only that.
    """
    outputs, dtype, target = assembled.outputs, HEADER_DTYPES[assembled.dtype], options.target
    specs = [TensorSpec(n, dtype, o.shape, bytes_of(dtype, o.shape) or 0) for n, o in outputs.items()]
    weights = [spec for spec in specs if not isinstance(outputs[spec.name].origin, Computed)]
    routers = [spec for spec in specs if isinstance(outputs[spec.name].origin, Computed)]
    copied = {name: source for name, output in outputs.items() if (source := output.copied_from)}
    paths = {tensor.path for tensor in copied.values()}
    if not (target and paths and all(isinstance(path, Path) and shares_extents(path, target) for path in paths)):
        return Layout(tuple(layout_shards(weights, options.max_shard_bytes, routers)), 0)
    starts = {name: tensor.start for name, tensor in copied.items()}
    shards = layout_to_share(weights, starts, options.max_shard_bytes, routers)
    return Layout(tuple(shards), shared_bytes(specs, starts, shards))
