"""The least that a merge has to do: copy byte ranges by the kernel into preallocated files. Linux, no moemerge.

    python benchmarks/raw_copy.py RANGES.json OUT --fsync

`RANGES.json` is written by `ranges.py`. Two threads, `copy_file_range` in steps of 64 MiB. `--fsync` waits until the
bytes are on the disk, as moemerge does.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STEP_BYTES = 64 * 2**20
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranges", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fsync", action="store_true")
    options = parser.parse_args()
    work = json.loads(options.ranges.read_text())
    options.out.mkdir(parents=True)
    targets = {name: os.open(options.out / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) for name in work["files"]}
    for name, nbytes in work["files"].items():
        os.posix_fallocate(targets[name], 0, nbytes)
    sources = {path: os.open(path, os.O_RDONLY) for path in {entry[0] for entry in work["ranges"]}}

    def copy(entry: tuple[str, int, str, int, int]) -> None:
        path, start, name, target_start, nbytes = entry
        done = 0
        while done < nbytes:
            moved = os.copy_file_range(
                sources[path], targets[name], min(nbytes - done, STEP_BYTES), start + done, target_start + done
            )
            assert moved, f"{path} ended early"
            done += moved

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, work["ranges"]))
    if options.fsync:
        for target in targets.values():
            os.fsync(target)


if __name__ == "__main__":
    main()
