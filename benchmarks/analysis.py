"""The static analysis of a mixture of 8 x 7B's shape: time beside a plain reading of the same bytes, and peak memory.

    python benchmarks/analysis.py --folder FOLDER --layers 2 --repeat 3 --markdown

Linux only. A checkpoint with so many layers of the shape is made in a new folder inside FOLDER, 2.8 GB for each, and
removed again. Neurons are matched in its last layer; the time of all 32 layers is what they would take with as many
matched as are in the whole model. Both read from the disk, and, in rows of their own, from the page cache, which holds
no whole model of that size. This program imports the standard library alone: see `measure.py`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from measure import run
from table import Row, as_markdown, as_text, machine
from workshop import HERE, Workshop, say

GIGABYTES = {"tiny": 0.001, "8x7b": 2.9}
PEAK_MB = 1500
READ_RATIO = 1.5


@dataclass(frozen=True)
class Suite:
    folder: Path
    shape: str
    layers: int
    repeat: int

    def step(self, name: str) -> tuple[dict[str, float], int]:
        """What a step prints, and its peak memory in bytes."""
        words = ["--shape", self.shape, "--layers", str(self.layers)]
        found = run([sys.executable, HERE / "analysis_process.py", name, self.folder, *words])
        say(f"{name}: {found.output.strip()}, {found.seconds:.1f} s, {found.cpu_seconds:.1f} s of processor time")
        return json.loads(found.output), found.peak_bytes

    def forget(self) -> None:
        """Let the page cache forget the checkpoint."""
        os.sync()
        for path in self.folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(suite: Suite, *, cached: bool) -> Iterator[Row]:
    """Plain reading and analysis in turns."""
    readings, analyses, peaks = [], [], []
    for _ in range(suite.repeat):
        for name in ("read", "analyse"):
            if cached:
                suite.step("read")
            else:
                suite.forget()
            found, peak = suite.step(name)
            if name == "read":
                readings.append(found)
            else:
                analyses.append(found)
                peaks.append(peak)
    matched, layers = int(analyses[0]["matched_layers"]), int(analyses[0]["all_layers"])
    plain, with_matching, plain_cpu, matching_cpu = (
        median(found[name] for found in analyses) for name in ("plain", "matched", "plain_cpu", "matched_cpu")
    )
    reading, reading_cpu = (median(found[name] for found in readings) / suite.layers for name in ("seconds", "cpu"))
    seconds = (layers - matched) * plain + matched * with_matching
    place = "page cache" if cached else "disk"
    ratio = seconds / (layers * reading)
    yield Row(
        f"analysis of {layers} layers, {suite.shape}, from the {place}: time / plain reading",
        "-" if cached else f"<= {READ_RATIO:.2f}",
        f"{ratio:.2f} ({seconds:.1f} s / {layers * reading:.1f} s)",
        None if cached else ratio <= READ_RATIO,
    )
    for what, wall, cpu in (
        ("read plainly", reading, reading_cpu),
        ("analysed", plain, plain_cpu),
        (f"analysed, {int(analyses[0]['neurons'])} neurons matched, as {matched} are", with_matching, matching_cpu),
    ):
        yield Row(f"one layer from the {place}, {what}", "-", f"{wall:.2f} s ({cpu:.2f} s of processor time)")
    most = max(peaks) / 1e6
    yield Row(f"the same, from the {place}: peak memory", f"<= {PEAK_MB} MB", f"{most:.0f} MB", most <= PEAK_MB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=2, help="how many layers are made, two or more")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of everything that is timed")
    parser.add_argument("--shape", choices=GIGABYTES, default="8x7b", help="tiny: to see that the program works")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moemerge-bench-", dir=options.folder.resolve()) as folder:
        Workshop(Path(folder)).need(options.layers * GIGABYTES[options.shape], "the checkpoint")
        suite = Suite(Path(folder) / "mixture", options.shape, options.layers, options.repeat)
        suite.step("make")
        rows = [*measure(suite, cached=False), *measure(suite, cached=True)]
    print(machine(options.folder))
    print(f"Medians of {options.repeat} rounds in turns, {time.perf_counter() - start:.0f} s in all.")
    print()
    print(as_markdown(rows) if options.markdown else as_text(rows))


if __name__ == "__main__":
    main()
