"""The last step of a plan: decide which file each output tensor is in, and where its bytes begin."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moemerge.checkpoint.extents import layout_to_share, shareable_starts, shared_bytes
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX, build_index
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

    @property
    def weight_bytes(self) -> int:
        """Total size of all shards in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_bytes(self) -> int:
        """Total size of all tensors in bytes, without headers."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def file_names(self) -> list[str]:
        """Names of the shards, and of the index where there is one."""
        names = [shard.name for shard in self.shards]
        return [*names, SAFETENSORS_INDEX] if len(names) > 1 else names

    @property
    def index(self) -> str | None:
        """The text of the index, or None where one file holds everything."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: shard.name for shard in self.shards for name in shard.starts}
        return build_index(weight_map, self.tensor_bytes)


def lay_out(assembled: Assembled, options: PlanOptions) -> Layout:
    """Decide the files of a merged model, whose routers come last; see `divide`."""
    outputs, dtype = assembled.outputs, HEADER_DTYPES[assembled.dtype]
    specs = [TensorSpec(n, dtype, o.shape, bytes_of(dtype, o.shape) or 0) for n, o in outputs.items()]
    copied = {name: source for name, output in outputs.items() if (source := output.copied_from)}
    routers = {name for name, output in outputs.items() if isinstance(output.origin, Computed)}
    return divide(specs, copied, routers, options)


def divide(
    specs: Sequence[TensorSpec], copied: Mapping[str, TensorInfo], last: Collection[str], options: PlanOptions
) -> Layout:
    """Divide tensors into files, laid out so that blocks can be shared with the sources where that is possible.

    Args:
        specs: all tensors, in their order.
        copied: the source of each tensor whose bytes are those of one source tensor, by name.
        last: names of the tensors, routers, that have a small last file of their own, so that whoever changes only them
            writes only that.
        options: the size of files, and the folder that will be written.
    """
    weights, routers = ([spec for spec in specs if (spec.name in last) == is_last] for is_last in (False, True))
    starts = shareable_starts(copied, options.target) if options.target is not None else {}
    if not starts:
        return Layout(tuple(layout_shards(weights, options.max_shard_bytes, routers)), 0)
    shards = layout_to_share(weights, starts, options.max_shard_bytes, routers)
    return Layout(tuple(shards), shared_bytes(specs, starts, shards))
