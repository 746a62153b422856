"""Write the byte ranges of a merge to a JSON file, for `raw_copy.py`.

    python benchmarks/ranges.py CONFIG RANGES.json

The file holds `files` (shard name to bytes), `ranges` (source path, source offset, shard, shard offset, bytes) and
`input_bytes`, all that the merge reads. Headers of shards are written to a file beside it, and copied from there.
Routers and constants are left out. Pieces that lie side by side are copied one behind the other; of a tensor that the
merge converts, as many bytes are copied as the merge writes.
"""

import argparse
import json
from pathlib import Path

from moemerge import load_config, plan_merge
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.shards import parse_size
from moemerge.planning.options import PlanOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("ranges", type=Path)
    parser.add_argument("--max-shard-size", type=parse_size, default="5GB")
    options = parser.parse_args()
    plan = plan_merge(load_config(options.config), PlanOptions(max_shard_bytes=options.max_shard_size))
    headers = options.ranges.with_suffix(".headers").resolve()
    ranges, header_start, input_bytes = [], 0, 0
    for shard in plan.shards:
        ranges.append((str(headers), header_start, shard.name, 0, len(shard.header)))
        header_start += len(shard.header)
        for name, place in shard.starts.items():
            start = place
            for piece in plan.outputs[name].pieces:
                source = piece.source
                if isinstance(source, TensorInfo):
                    assert piece.nbytes <= source.nbytes
                    ranges.append((str(source.path), source.start, shard.name, start, piece.nbytes))
                    input_bytes += source.nbytes
                start += piece.nbytes
    headers.write_bytes(b"".join(shard.header for shard in plan.shards))
    files = {shard.name: shard.nbytes for shard in plan.shards}
    options.ranges.write_text(json.dumps({"files": files, "ranges": ranges, "input_bytes": input_bytes}))


if __name__ == "__main__":
    main()
