"""Write the byte ranges of a merge, or of an edit of a mixture, to a JSON file, for `raw_copy.py`.

    python benchmarks/ranges.py CONFIG RANGES.json
    python benchmarks/ranges.py CONFIG RANGES.json --in-place
    python benchmarks/ranges.py MIXTURE#EXPERT RANGES.json

The config is that of a merge or of an edit; of one in place, the ranges are those of the shards that change. An expert
stands for the dense model that is extracted. The file holds `files` (shard name to bytes), `ranges` (source path,
source offset, shard, shard offset, bytes) and `input_bytes`, all that is read. Headers of shards are written to a file
beside it, and copied from there. Computed routers and constants are left out. Pieces that lie side by side are copied
one behind the other; of a tensor that the merge converts, as many bytes are copied as the merge writes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moemerge import load_config, plan_merge
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Piece
from moemerge.checkpoint.shards import Shard, parse_size
from moemerge.editing.dense.extracting import plan_extract
from moemerge.editing.in_place import changed_shards
from moemerge.editing.planner import edits_mixture, plan_edit
from moemerge.planning.options import PlanOptions
from moemerge.sources.reference import split_expert

Work = tuple[Sequence[Shard], Mapping[str, Sequence[Piece]]]
"""The files to write, and the pieces of each tensor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("ranges", type=Path)
    parser.add_argument("--max-shard-size", type=parse_size, default="5GB")
    parser.add_argument("--in-place", action="store_true")
    options = parser.parse_args()
    shards, pieces = work_of(options.config, PlanOptions(options.max_shard_size), in_place=options.in_place)
    headers = options.ranges.with_suffix(".headers").resolve()
    ranges, header_start, input_bytes = [], 0, 0
    for shard in shards:
        ranges.append((str(headers), header_start, shard.name, 0, len(shard.header)))
        header_start += len(shard.header)
        for name, place in shard.starts.items():
            start = place
            for piece in pieces[name]:
                source = piece.source
                if isinstance(source, TensorInfo):
                    assert piece.nbytes <= source.nbytes
                    ranges.append((str(source.path), source.start, shard.name, start, piece.nbytes))
                    input_bytes += source.nbytes
                start += piece.nbytes
    headers.write_bytes(b"".join(shard.header for shard in shards))
    files = {shard.name: shard.nbytes for shard in shards}
    options.ranges.write_text(json.dumps({"files": files, "ranges": ranges, "input_bytes": input_bytes}))


def work_of(given: str, options: PlanOptions, *, in_place: bool) -> Work:
    if split_expert(given):
        dense = plan_extract(given, options=options)
        return dense.shards, {name: [piece] for name, piece in dense.pieces.items()}
    config = load_config(given, allow_identical_experts=True)
    if not edits_mixture(config, lambda _: None):
        merge = plan_merge(config, options)
        return merge.shards, {name: output.pieces for name, output in merge.outputs.items()}
    edit = plan_edit(config, options)
    shards = changed_shards(edit, options.max_shard_bytes).written if in_place else edit.shards
    return shards, {name: output.pieces for name, output in edit.outputs.items()}


if __name__ == "__main__":
    main()
