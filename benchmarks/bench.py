"""The whole suite: every target of moemerge's speed and memory, measured side by side, in one table.

    python benchmarks/bench.py --folder FOLDER --repeat 5 --full --markdown

Linux only. Models and outputs are made in a new folder inside FOLDER and removed again; what there is no room for is
named and left out. `docs/performance.md` says what the rows mean. This program imports the standard library alone:
see `measure.py`.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from measure import Run, run
from table import Row, as_markdown, as_text, machine
from workshop import GIGABYTES, HERE, MOEMERGE, Command, NoRoomError, Workshop, merged_gigabytes, say

EXPERTS = 4
PEAK_MB = 450
SPREAD = 1.10
THREAD_BUFFER_MB = 1
RAW_RATIO = 1.10
QUICK_RUNS = 2  # in each round, of what takes less than a second
# Experts and shard size. The corners alone, or everything.
MEMORY_RUNS = ((2, "1GB"), (2, "10GB"), (8, "10GB"))
FULL_MEMORY_RUNS = tuple((experts, size) for experts in (2, 4, 8) for size in ("1GB", "10GB"))


@dataclass(frozen=True)
class Suite:
    shop: Workshop
    shape: str
    large: str
    repeat: int
    full: bool
    mergekit: Path | None


def merge(suite: Suite) -> Iterator[Row]:
    """The same dtype: the time against raw copies of the same bytes, and against mergekit-moe."""
    shop, models = suite.shop, suite.shop.models(suite.shape, EXPERTS)
    shop.need(merged_gigabytes(suite.shape, EXPERTS), "the merge")
    configs = {mode: shop.config(models, EXPERTS, mode) for mode in ("random", "cheap_embed")}
    ranges = shop.ranges(configs["random"])
    ways = {"raw copy": shop.raw_copy(ranges, fsync=False), "raw copy + fsync": shop.raw_copy(ranges, fsync=True)}
    for mode, config in configs.items():
        ways[mode] = shop.merge(config)
        if suite.mergekit:
            ways[f"mergekit-moe {mode}"] = [suite.mergekit, config, shop.out]
    runs = shop.rounds(ways, models, suite.repeat)
    for mode in configs:
        what = f"merge, {EXPERTS} x {suite.shape}, {mode}"
        yield ratio_row(f"{what}: time / raw copy + fsync", runs[mode], runs["raw copy + fsync"], RAW_RATIO)
        yield ratio_row(f"{what}: time / raw copy, not flushed", runs[mode], runs["raw copy"], None)
        if theirs := runs.get(f"mergekit-moe {mode}"):
            yield ratio_row(f"{what}: time / mergekit-moe", runs[mode], theirs, 0.5)
        yield peak_row(f"{what}: peak memory", peak(runs[mode]), PEAK_MB, theirs)


def hidden(suite: Suite) -> Iterator[Row]:
    """Routers from the base model's layers: memory of the merge, time of the pass alone."""
    shop, models = suite.shop, suite.shop.models(suite.shape, EXPERTS)
    config = shop.config(models, EXPERTS, "hidden")
    passes: dict[str, Command] = {
        "whole": [sys.executable, HERE / "whole_model_pass.py", config],
        "streamed": [sys.executable, HERE / "streamed_pass.py", config],
    }
    runs = shop.rounds(passes, models, (suite.repeat + 1) // 2)  # half a minute each, and no disk to wait for
    loading, running = (
        median(json.loads(r.output)[key] for r in runs["whole"]) for key in ("load_seconds", "run_seconds")
    )
    what = f"hidden, {suite.shape}, 40 prompts"
    row = ratio_row(f"{what}: time of the pass alone / whole model", runs["streamed"], runs["whole"], 1.0)
    yield replace(row, measured=f"{row.measured}: {loading:.1f} s to load, {running:.1f} s to run")
    yield peak_row(f"{what}: peak memory of that pass", peak(runs["streamed"]), None, runs["whole"])
    shop.need(merged_gigabytes(suite.shape, EXPERTS), "the merge")
    yield peak_row(f"{what}: peak memory of the merge", shop.once(shop.merge(config), None).peak_bytes, 900)
    if suite.full:
        config = shop.config(shop.models(suite.large, 8, sparse=True), 2, "hidden")
        shop.need(merged_gigabytes(suite.large, 2), f"the merge of 2 x {suite.large}")
        found = shop.once(shop.merge(config), None).peak_bytes
        yield peak_row(f"hidden, {suite.large}, 40 prompts: peak memory of the merge", found, 2000)


def memory(suite: Suite) -> Iterator[Row]:
    """Peak memory over shapes, experts and shard sizes. Sources are holes, outputs are real."""
    shop, peaks = suite.shop, []
    cases = [(suite.shape, *case) for case in (FULL_MEMORY_RUNS if suite.full else MEMORY_RUNS)]
    for shape, experts, size in [*cases, *[(suite.large, 2, "10GB")] * suite.full]:
        what = f"memory, {experts} x {shape}, random, {size} shards: peak"
        config = shop.config(shop.models(shape, 8, sparse=True), experts, "random")
        try:
            shop.need(merged_gigabytes(shape, experts), "the merge")
        except NoRoomError as error:
            yield skipped(what, error)
            continue
        peaks.append(shop.once(shop.merge(config, "--max-shard-size", size), None).peak_bytes)
        yield peak_row(what, peaks[-1], PEAK_MB)
    if peaks:
        spread = max(peaks) / min(peaks)
        yield Row("memory: largest of these peaks / smallest", f"<= {SPREAD:.2f}", f"{spread:.2f}", spread <= SPREAD)


def cast(suite: Suite) -> Iterator[Row]:
    """Merges that convert to bfloat16: GB of input per second, beside a raw copy of the same output."""
    shop = suite.shop
    for dtype in ("fp32", "fp16"):
        what = f"cast, {dtype} -> bf16, 2 x {suite.shape}"
        try:
            models = shop.models(suite.shape, 2, dtype)
            shop.need(merged_gigabytes(suite.shape, 2), "the merge")
        except NoRoomError as error:
            yield skipped(what, error)
            continue
        config = shop.config(models, 2, "random")
        ranges = shop.ranges(config)
        ways = {"raw": shop.raw_copy(ranges, fsync=True), "merge": shop.merge(config)}
        runs = shop.rounds(ways, models, suite.repeat)
        gigabytes = json.loads(ranges.read_text())["input_bytes"] / 1e9
        seconds, cpu = (median(getattr(r, name) for r in runs["merge"]) for name in ("seconds", "cpu_seconds"))
        slower = seconds / median(r.seconds for r in runs["raw"])
        yield Row(
            f"{what}: input per second and core",
            f">= 1 GB/s, or time <= {RAW_RATIO:.2f} x raw copy + fsync",
            f"{gigabytes / cpu:.2f} GB/s ({gigabytes / seconds:.2f} GB/s on {cpu / seconds:.1f} cores); {slower:.2f} x",
            gigabytes / cpu >= 1 or slower <= RAW_RATIO,
        )
        limit = PEAK_MB + THREAD_BUFFER_MB * min(4, os.cpu_count() or 1)
        yield peak_row(f"{what}: peak memory", peak(runs["merge"]), limit)
    size = "0.01" if suite.shape == "tiny" else "0.5"
    output = run([sys.executable, HERE / "cast.py", shop.folder, "--gb", size, "--repeat", str(suite.repeat)]).output
    for stored, rate, rest in re.findall(r"^(F\d+) cast to BF16 +([\d.]+) GB/s  (.*)$", output, re.MULTILINE):
        yield Row(f"cast, {stored} -> BF16, one thread alone", ">= 1 GB/s", f"{rate} GB/s, {rest}", float(rate) >= 1)


def dequantised(suite: Suite) -> Iterator[Row]:
    """Quantised weights as they are read: GB of bfloat16 per second of one thread, beside copies of as many bytes."""
    size = "0.01" if suite.shape == "tiny" else "0.5"
    folder, repeat = suite.shop.folder, str(suite.repeat)
    output = run([sys.executable, HERE / "dequantise.py", folder, "--gb", size, "--repeat", repeat]).output
    for name, rate, rest in re.findall(r"^(.+?) +([\d.]+) GB/s  (.*)$", output, re.MULTILINE):
        yield Row(f"dequantised, one thread alone: {name}", "-", f"{rate} GB/s, {rest}", None)


def plan(suite: Suite) -> Iterator[Row]:
    """The plan of a large merge, from headers."""
    shop = suite.shop
    config = shop.config(shop.models(suite.large, 8, sparse=True), 8, "random")
    runs = [run([*MOEMERGE, "plan", config]) for _ in range(QUICK_RUNS * suite.repeat)]
    seconds, read = median(r.seconds for r in runs), median(r.read_bytes for r in runs) / 1e6
    yield Row(f"plan, 8 x {suite.large}: time", "< 1 s", f"{seconds:.2f} s", seconds < 1)
    measured = f"{read:.0f} MB in all, of {8 * GIGABYTES[suite.large][0]:.0f} GB"
    yield Row(f"plan, 8 x {suite.large}: bytes read, Python's modules included", "< 100 MB", measured, read < 100)


def help_text(suite: Suite) -> Iterator[Row]:
    """How soon the command answers."""
    seconds = median(run([*MOEMERGE, "--help"]).seconds for _ in range(QUICK_RUNS * suite.repeat))
    yield Row("moemerge --help: time", "< 0.3 s", f"{seconds:.2f} s", seconds < 0.3)


SECTIONS: dict[str, Callable[[Suite], Iterator[Row]]] = {
    "merge": merge,
    "hidden": hidden,
    "memory": memory,
    "cast": cast,
    "dequantised": dequantised,
    "plan": plan,
    "help": help_text,
}


def section(name: str, suite: Suite) -> Iterator[Row]:
    start = time.perf_counter()
    try:
        yield from SECTIONS[name](suite)
    except NoRoomError as error:
        yield skipped(name, error)
    say(f"{name}: {time.perf_counter() - start:.0f} s")


def ratio_row(what: str, ours: list[Run], theirs: list[Run], limit: float | None) -> Row:
    """The ratio of two medians."""
    seconds, base = (median(r.seconds for r in runs) for runs in (ours, theirs))
    target = "-" if limit is None else f"<= {limit:.2f}"
    met = None if limit is None else seconds / base <= limit
    return Row(what, target, f"{seconds / base:.2f} ({seconds:.1f} s / {base:.1f} s)", met)


def peak(runs: list[Run]) -> int:
    return max(r.peak_bytes for r in runs)


def peak_row(what: str, found: int, limit_mb: int | None, theirs: list[Run] | None = None) -> Row:
    megabytes = found / 1e6
    measured = f"{megabytes:.0f} MB" + (f" (theirs: {peak(theirs) / 1e6:.0f} MB)" if theirs else "")
    target = "-" if limit_mb is None else f"< {limit_mb} MB"
    return Row(what, target, measured, None if limit_mb is None else megabytes < limit_mb)


def skipped(what: str, error: NoRoomError) -> Row:
    say(f"skipped: {what}: {error}")
    return Row(what, "-", f"not measured: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="on the disk to be measured")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of everything that is timed")
    parser.add_argument("--full", action="store_true", help="more memory cases, and the 7B shape: 26 GB of disk")
    parser.add_argument("--mergekit", type=Path, metavar="PATH", help="a mergekit-moe to compare with")
    parser.add_argument("--shape", choices=("tiny", "1b"), default="1b", help="tiny: to see that the programs work")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moemerge-bench-", dir=options.folder.resolve()) as folder:
        large = "tiny" if options.shape == "tiny" else "7b"
        mergekit = options.mergekit and options.mergekit.absolute()
        suite = Suite(Workshop(Path(folder)), options.shape, large, options.repeat, options.full, mergekit)
        run([*MOEMERGE, "--help"])  # Python compiles modules once
        for name in options.only:
            rows.extend(section(name, suite))
    print(machine(options.folder))
    print(
        f"Medians of {options.repeat} interleaved rounds, {time.perf_counter() - start:.0f} s in all. Before each "
        "timed merge or pass the disk has nothing left to write, and the sources are read once: the page cache is warm."
    )
    print()
    print(as_markdown(rows) if options.markdown else as_text(rows))


if __name__ == "__main__":
    main()
