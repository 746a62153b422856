"""Merges by several processes (`--ray`): the bytes of one, the memory of the head, and time with throttled copies.

    python benchmarks/merge_workers.py --folder FOLDER --shape 1b

Linux only; needs Ray. Models and outputs are made in a new folder inside FOLDER and removed again; the 1b shape takes 9
GB. The cluster is on this machine, so its processes share one disk and few processors. What several machines would do
is therefore simulated: each process copies no more than so many bytes per second, which it waits for, and the time is
compared with bytes / (processes x bandwidth).
"""

import argparse
import hashlib
import heapq
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from measure import Run, run
from table import Row, as_markdown, as_text, machine, markdown_table, text_table
from workshop import Command, Workshop, merged_gigabytes, say

HERE = Path(__file__).parent
WORKERS = 4
EXPERTS = 2
SHARD_SIZE = "200MB"
MOST_MB = 450
NEAR = 0.15
SECTIONS = ("equal", "throttled", "paper")
MACHINES = (1, 4, 16)
GIGABITS = (10, 25, 100)
STORAGE = (2e9, 20e9)


def equal(shop: Workshop, shape: str, smaller: str) -> Iterator[Row]:
    """The same merge by one process and by several, and the head's memory for a smaller shape."""
    peaks = []
    for name in (smaller, shape):
        config = shop.config(shop.models(name, EXPERTS), EXPERTS, "random")
        shop.need(merged_gigabytes(name, EXPERTS), "the merge")
        alone, theirs = hashed(shop, shop.merge(config, "--max-shard-size", SHARD_SIZE))
        by_processes = ("--max-shard-size", SHARD_SIZE, "--ray", "local", "--workers", str(WORKERS))
        together, taken = hashed(shop, shop.merge(config, *by_processes))
        what = f"merge, {EXPERTS} x {name}, {WORKERS} processes"
        yield Row(
            f"{what}: bytes equal to those of one", "yes", "yes" if alone == together else "no", alone == together
        )
        yield peak_row(f"{what}: peak memory of the head", taken)
        yield peak_row(f"merge, {EXPERTS} x {name}, one process: peak memory", theirs)
        yield Row(
            f"{what}: time, with the start of the cluster", "-", f"{taken.seconds:.0f} s ({theirs.seconds:.0f} s alone)"
        )
        peaks.append(taken.peak_bytes)
        killed, _ = hashed(shop, [sys.executable, __file__, "--kill", config, shop.out])
        row = f"{what}, one killed in its first shard: bytes equal to those of one"
        yield Row(row, "yes", "yes" if alone == killed else "no", alone == killed)
    ratio = max(peaks) / min(peaks)
    yield Row("peak memory of the head: larger model / smaller", "<= 1.10", f"{ratio:.2f}", ratio <= 1.1)


def hashed(shop: Workshop, command: Command) -> tuple[Mapping[str, str], Run]:
    """Hashes of a merge's files of weights, by name, and what the merge took."""
    try:
        done = run(command)
        found = {}
        for path in sorted(shop.out.glob("model*")):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found, done
    finally:
        shutil.rmtree(shop.out, ignore_errors=True)


def kill(config: str, out: Path) -> None:
    """Merge by several processes, of which the first that has written something of a shard is killed."""
    from moemerge import load_config, merge, plan_merge
    from moemerge.checkpoint.shards import parse_size
    from moemerge.merging import shared_folder
    from moemerge.merging.shard_jobs import FolderWorker, SharedStage, Surroundings
    from moemerge.planning.options import PlanOptions

    marker = out.with_name("killed")

    def die(_nbytes: int) -> None:
        with suppress(FileExistsError):
            marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)

    class Mortal(FolderWorker):
        """Is killed, if it is the first."""

        def __init__(self, here: Surroundings, writer: Callable[..., Any], stage: SharedStage) -> None:
            super().__init__(here, lambda folder, shards, _report: writer(folder, shards, die), stage)

    setattr(shared_folder, "FolderWorker", Mortal)  # noqa: B010  what is imported is final for everybody else
    options = PlanOptions(max_shard_bytes=parse_size(SHARD_SIZE))
    plan = plan_merge(load_config(config), options)
    merge(plan, shared_folder.SharedFolder(out, address="local", workers=WORKERS))
    marker.unlink()  # it has been there


def peak_row(what: str, run: Run) -> Row:
    return Row(what, f"< {MOST_MB} MB", f"{run.peak_bytes / 1e6:.0f} MB", run.peak_bytes < MOST_MB * 1e6)


def throttled(shop: Workshop, shape: str, experts: int, rate: float, counts: list[int]) -> Iterator[Row]:
    """Time with slow copies, by more and more processes, from the first shard's beginning to the last one's end."""
    config = shop.config(shop.models(shape, experts), experts, "random")
    shop.need(merged_gigabytes(shape, experts), "the merge")
    command: list[str | Path] = [sys.executable, __file__, "--simulate", config, shop.out]
    command += ["--rate", str(rate), "--workers", *map(str, counts)]
    for line in run(command).output.splitlines():
        found = json.loads(line)
        expected = found["bytes"] / (found["workers"] * rate)
        ratio = found["seconds"] / expected
        yield Row(
            f"throttled, {experts} x {shape}, {rate / 1e6:g} MB/s each, {found['workers']} processes: "
            "time / (bytes / (processes x bandwidth))",
            f"<= {1 + NEAR:.2f}",
            f"{ratio:.2f} ({found['seconds']:.0f} s / {expected:.0f} s; {found['start']:.0f} s to start)",
            ratio <= 1 + NEAR,
        )


def simulate(config: str, out: Path, rate: float, counts: list[int]) -> None:
    """Merge with throttled processes, and print a line of JSON for each number of them."""
    import ray

    from moemerge import load_config, merge, plan_merge
    from moemerge.merging import shared_folder
    from moemerge.merging.shard_jobs import FolderWorker, ShardJob, SharedStage, Surroundings
    from moemerge.planning.options import PlanOptions

    class Throttled(FolderWorker):
        """Copies so many bytes per second, and writes down when it worked."""

        def __init__(self, here: Surroundings, writer: Callable[..., Any], stage: SharedStage) -> None:
            free_at = 0.0

            def wait(nbytes: int) -> None:
                nonlocal free_at
                free_at = max(free_at, began) + nbytes / rate
                time.sleep(max(0.0, free_at - time.monotonic()))

            began = 0.0

            def slow(folder: Path, shards: Any, _report: Any) -> Any:
                nonlocal began
                began = time.monotonic()
                return writer(folder, shards, wait)

            super().__init__(here, slow, stage)

        def run(self, job: ShardJob) -> None:
            start = time.time()
            super().run(job)
            with log.open("a") as file:
                file.write(f"{start} {time.time()}\n")

    setattr(shared_folder, "FolderWorker", Throttled)  # noqa: B010  what is imported is final for everybody else
    log = out.with_name("log")
    plan = plan_merge(load_config(config, allow_identical_experts=True), PlanOptions(max_shard_bytes=30_000_000))
    ray.init(address="local", num_cpus=max(counts), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for count in counts:
        log.unlink(missing_ok=True)
        begin = time.time()
        merge(plan, shared_folder.SharedFolder(out, address="local", workers=count))
        shutil.rmtree(out)
        times = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
        first, last = min(start for start, _ in times), max(end for _, end in times)
        nbytes = sum(shard.tensor_bytes for shard in plan.shards_without_routers)
        facts = {"workers": count, "bytes": nbytes, "seconds": last - first, "start": first - begin}
        print(json.dumps(facts), flush=True)


def on_paper(shop: Workshop, shape: str, experts: int) -> list[list[str]]:
    """Minutes of a merge on several machines, from the shards of its plan: what each link alone would take.

    Each machine has one process. It reads and writes all its bytes through one network card, which does both at once;
    the storage gives and takes so many bytes per second in all.
    """
    from moemerge import load_config, plan_merge
    from moemerge.planning.options import PlanOptions

    config = shop.config(shop.models(shape, experts, sparse=True), experts, "random")
    plan = plan_merge(load_config(config), PlanOptions())
    sizes = sorted((shard.tensor_bytes for shard in plan.shards_without_routers), reverse=True)
    say(f"{experts} x {shape}: {sum(sizes) / 1e9:.0f} GB in {len(sizes)} shards, the largest {max(sizes) / 1e9:.2f} GB")
    lines = []
    for machines in MACHINES:
        ends = [0] * machines
        for nbytes in sizes:
            heapq.heapreplace(ends, ends[0] + nbytes)
        cells = []
        for gigabits in GIGABITS:
            for storage in STORAGE:
                seconds = max(max(ends) / (gigabits / 8 * 1e9), sum(sizes) / storage)
                limit = "storage" if sum(sizes) / storage >= max(ends) / (gigabits / 8 * 1e9) else "network"
                cells.append(f"{seconds / 60:.1f} ({limit})")
        lines.append([str(machines), f"{max(ends) * machines / sum(sizes):.2f}", *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="on the disk to be measured")
    parser.add_argument("--shape", choices=("tiny", "1b"), default="1b", help="tiny: to see that the programs work")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument("--rate", type=float, default=8e6, help="bytes per second that each process copies")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kill", type=Path, nargs=2, metavar=("CONFIG", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--simulate", type=Path, nargs=2, metavar=("CONFIG", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.simulate:
        simulate(str(options.simulate[0]), options.simulate[1], options.rate, options.workers)
        return
    if options.kill:
        kill(str(options.kill[0]), options.kill[1])
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    tiny = options.shape == "tiny"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moemerge-bench-", dir=options.folder.resolve()) as folder:
        shop = Workshop(Path(folder))
        if "equal" in options.only:
            rows += equal(shop, options.shape, "tiny" if tiny else "slim")
        if "throttled" in options.only:
            rows += throttled(shop, "tiny" if tiny else "slim", 4, options.rate, options.workers)
        say(machine(options.folder))
        print(as_markdown(rows) if options.markdown else as_text(rows))
        if "paper" in options.only:
            headings = ["machines", "longest / mean"]
            headings += [f"{gigabits} Gbit/s, {storage / 1e9:g} GB/s" for gigabits in GIGABITS for storage in STORAGE]
            print()
            lines = on_paper(shop, "tiny" if tiny else "70b", 8)
            print(markdown_table(headings, lines) if options.markdown else text_table(headings, lines))


if __name__ == "__main__":
    main()
