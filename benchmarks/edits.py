"""Edits of a mixture: time, memory and disk of each, beside a raw copy of the bytes that it writes.

    python benchmarks/edits.py --folder FOLDER --repeat 5 --markdown

Linux only. A mixture of eight experts in shards of 1 GB is made in a new folder inside FOLDER, 16 GB with its sources
and outputs, and removed again. Where this process may mount a file system, the same is done on an image of XFS, whose
files share blocks. `docs/performance.md` says what the rows mean. This program imports the standard library alone: see
`measure.py`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import PEAK_MB, RAW_RATIO, SPREAD, peak, peak_row, skipped
from measure import Run, allocated_bytes, run
from table import Row, as_markdown, as_text, machine
from workshop import HERE, MOEMERGE, NoRoomError, Workshop, merged_gigabytes, say, warm

EXPERTS = 8
Words = list[str | Path]
NAMES = [f"e{number}" for number in range(EXPERTS)]
SHARD_SIZES = {"tiny": "100kB", "slim": "1GB"}
TURNED = ",".join([NAMES[1], NAMES[0], *NAMES[2:]])
TO_FOLDER = {
    "drop one": ["--drop", NAMES[3]],
    "another order": ["--order", ",".join(reversed(NAMES))],
    "keep every second, as prune does": ["--keep", ",".join(NAMES[::2])],
}
# Of the mixture's own experts, so that nothing has to be computed.
IN_PLACE = {"two experts change places": ["--order", TURNED], "one expert replaced": ["--replace", "e3={mixture}#e4"]}
QUICK_SECONDS = 1.0
SHARED_SECONDS = 1.0
# Beside tensors: blocks at their ends, headers, the folder itself.
SHARED_BYTES = 20_000_000


@dataclass(frozen=True)
class Suite:
    shop: Workshop
    shape: str
    repeat: int

    def mixture(self, experts: int = EXPERTS) -> Path:
        """A mixture whose experts are two models in turns; its sources are removed when the largest is made."""
        folder = self.shop.folder / f"mixture{experts}"
        if not folder.exists():
            models = self.shop.models(self.shape, 2)
            self.shop.need(merged_gigabytes(self.shape, experts), "making the mixture")
            chosen = [
                {"source_model": str(models / ("base", "expert0")[number % 2]), "name": NAMES[number]}
                for number in range(experts)
            ]
            config = self.shop.folder / "merge.yaml"
            config.write_text(
                json.dumps({"base_model": str(models / "base"), "gate_mode": "random", "experts": chosen})
            )
            size = ("--max-shard-size", SHARD_SIZES[self.shape])
            run([*MOEMERGE, config, folder, "--allow-identical-experts", *size, "--quiet"])
        return folder

    def raw_copy(self, mixture: Path, flags: list[str], *, in_place: bool = False) -> Words:
        """The raw copy, flushed to the disk, of what an edit writes."""
        words = [*MOEMERGE, "edit", mixture, *(["--in-place"] if in_place else [self.shop.out]), *flags]
        planned = json.loads(run([*words, "--dry-run", "--json", *self._size]).output)
        config = self.shop.folder / "edit.yaml"
        config.write_text(planned["yaml"])
        return self.raw_copy_of(str(config), "--in-place" if in_place else "")

    def raw_copy_of(self, given: str, *options: str) -> Words:
        ranges = Path(tempfile.mkdtemp(dir=self.shop.folder)) / "ranges.json"
        run([sys.executable, HERE / "ranges.py", given, ranges, *filter(None, options), *self._size])
        return [sys.executable, HERE / "raw_copy.py", ranges, self.shop.out, "--fsync"]

    def edit(self, mixture: Path, flags: list[str]) -> Words:
        return [*MOEMERGE, "edit", mixture, self.shop.out, *flags, "--quiet", *self._size]

    @property
    def _size(self) -> list[str]:
        return ["--max-shard-size", SHARD_SIZES[self.shape]]


def to_folder(suite: Suite) -> Iterator[Row]:
    """Edits into a new folder, and experts taken out, against raw copies of the same bytes."""
    mixture, shop = suite.mixture(), suite.shop
    shop.need(merged_gigabytes(suite.shape, EXPERTS), "an edit")
    for what, flags in TO_FOLDER.items():
        yield from _beside_raw_copy(suite, what, suite.raw_copy(mixture, flags), suite.edit(mixture, flags))
    one = f"{mixture}#e5"
    yield from _beside_raw_copy(
        suite, "extract", suite.raw_copy_of(one), [*MOEMERGE, "extract", one, shop.out, "--quiet"]
    )
    average: Words = [*MOEMERGE, "densify", mixture, shop.out, "--average", "--quiet"]
    found = [shop.once(average, mixture) for _ in range(suite.repeat)]
    read, seconds = allocated_bytes(mixture) / 1e9, median(r.seconds for r in found)
    measured = f"{read / seconds:.2f} GB/s, {seconds:.1f} s"
    yield Row("densify --average: bytes of the mixture per second", "-", measured)
    yield peak_row("densify --average: peak memory", peak(found), PEAK_MB)


def _beside_raw_copy(suite: Suite, what: str, raw: Words, command: Words) -> Iterator[Row]:
    runs = suite.shop.rounds(
        {"start": [*command, "--dry-run"], "raw": raw, what: command}, suite.mixture(), suite.repeat
    )
    yield bytes_row(what, runs[what], runs["start"], runs["raw"])
    yield peak_row(f"{what}: peak memory", peak(runs[what]), PEAK_MB)


def in_place(suite: Suite) -> Iterator[Row]:
    """Edits of the mixture's own files, undone and made final, against raw copies of the shards that change."""
    mixture, shop = suite.mixture(), suite.shop
    shop.need(merged_gigabytes(suite.shape, EXPERTS), "an edit in place")
    for what, words in IN_PLACE.items():
        flags = [word.format(mixture=mixture) for word in words]
        raw = suite.raw_copy(mixture, flags, in_place=True)
        copies, starts, edits, undone = [], [], [], []
        for _ in range(suite.repeat):
            copies.append(shop.once(raw, mixture))
            starts.append(shop.once(change(mixture, *flags, "--dry-run"), None))
            edits.append(shop.once(change(mixture, *flags), mixture))
            undone.append(shop.once(edit(mixture, "--undo"), None))
            say(f"{what}: {copies[-1].seconds:.2f} s, {edits[-1].seconds:.2f} s, undone {undone[-1].seconds:.2f} s")
        yield bytes_row(f"in place, {what}", edits, starts, copies)
        yield peak_row(f"in place, {what}: peak memory", peak(edits), PEAK_MB)
        yield seconds_row(f"in place, {what}: --undo", undone, QUICK_SECONDS)
    top_k, written = [], []
    for _ in range(suite.repeat):
        before = {path.name: path.stat().st_ino for path in mixture.iterdir()}
        top_k.append(shop.once(change(mixture, "--top-k", "1"), None))
        changed = [path for path in mixture.iterdir() if before.get(path.name) != path.stat().st_ino]
        written.append(sum(path.stat().st_size for path in changed))
        shop.once(edit(mixture, "--undo"), None)
    yield seconds_row("in place, --top-k 1: time", top_k, QUICK_SECONDS)
    names = ", ".join(sorted(path.name for path in changed))
    yield Row("in place, --top-k 1: bytes written", "< 100 kB", f"{max(written)} ({names})", max(written) < 100_000)
    final = []
    for order in (TURNED, ",".join(NAMES)) * ((suite.repeat + 1) // 2):  # the second brings back what the first turned
        shop.once(change(mixture, "--order", order), None)
        final.append(shop.once(edit(mixture, "--commit"), None))
    yield seconds_row("in place, two experts change places: --commit", final, QUICK_SECONDS)


def memory(suite: Suite) -> Iterator[Row]:
    """Peak memory of an edit of a small mixture and of a large one."""
    peaks = {}
    for experts in (2, EXPERTS):
        mixture = suite.mixture(experts)
        flags = ["--order", ",".join(reversed(NAMES[:experts]))]
        peaks[experts] = suite.shop.once(suite.edit(mixture, flags), None).peak_bytes
    spread = max(peaks.values()) / min(peaks.values())
    megabytes = " and ".join(f"{found / 1e6:.0f} MB" for found in peaks.values())
    what = f"peak memory with {EXPERTS} experts / with 2"
    yield Row(what, f"<= {SPREAD:.2f}", f"{spread:.2f} ({megabytes})", spread <= SPREAD)


def shared(suite: Suite) -> Iterator[Row]:
    """The same on XFS, whose files share blocks: no time, and no room."""
    gigabytes = merged_gigabytes(suite.shape, EXPERTS)
    suite.shop.need(1.5 * gigabytes, "an image of XFS")
    with xfs(suite.shop.folder / "image", int(1.5e9 * gigabytes) + 400_000_000) as disk:
        mixture = disk / "mixture"
        shutil.copytree(suite.mixture(), mixture)
        there = Suite(Workshop(disk), suite.shape, suite.repeat)
        replace = [flag.format(mixture=mixture) for flag in IN_PLACE["one expert replaced"]]
        ways: dict[str, list[Words]] = {
            **{what: [there.edit(mixture, flags)] for what, flags in TO_FOLDER.items()},
            "extract": [[*MOEMERGE, "extract", f"{mixture}#e5", there.shop.out, "--quiet"]],
            "in place, one expert replaced": [change(mixture, *replace), edit(mixture, "--undo")],
        }
        for what, (command, *after) in ways.items():
            runs, taken = [], []
            for _ in range(suite.repeat):
                os.sync()
                free = os.statvfs(disk)
                warm(mixture)
                runs.append(run(command))
                os.sync()
                taken.append((free.f_bfree - os.statvfs(disk).f_bfree) * free.f_frsize)
                for back in after:
                    run(back)
                shutil.rmtree(there.shop.out, ignore_errors=True)
            yield seconds_row(f"on XFS, {what}: time", runs, SHARED_SECONDS)
            measured = f"{max(taken) / 1e6:.1f} MB"
            yield Row(f"on XFS, {what}: room", f"< {SHARED_BYTES / 1e6:.0f} MB", measured, max(taken) < SHARED_BYTES)


@contextmanager
def xfs(image: Path, nbytes: int) -> Iterator[Path]:
    """A context with an empty file system that shares blocks.

    Raises:
        NoRoomError: none can be made or mounted here.
    """
    disk = image.with_name("disk")
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(max(nbytes, 400 * 2**20))
    try:
        subprocess.run(["mkfs.xfs", "-q", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoRoomError(f"no XFS can be made and mounted here ({error})") from error
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
        image.unlink()


def edit(mixture: Path, *flags: str) -> Words:
    return [*MOEMERGE, "edit", mixture, *flags, "--quiet"]


def change(mixture: Path, *flags: str) -> Words:
    return edit(mixture, "--in-place", *flags)


def bytes_row(what: str, edits: list[Run], starts: list[Run], copies: list[Run]) -> Row:
    """The ratio to the raw copy of what an edit takes after its plan is made, which `--dry-run` does, too."""
    whole, start, raw = (median(r.seconds for r in runs) for runs in (edits, starts, copies))
    ratio = (whole - start) / raw
    measured = f"{ratio:.2f} ({whole:.1f} s with {start:.1f} s to start and plan / {raw:.1f} s)"
    return Row(f"{what}: time after the plan / raw copy + fsync", f"<= {RAW_RATIO:.2f}", measured, ratio <= RAW_RATIO)


def seconds_row(what: str, runs: list[Run], limit: float) -> Row:
    seconds = median(r.seconds for r in runs)
    cpu = median(r.cpu_seconds for r in runs)
    return Row(what, f"< {limit:.0f} s", f"{seconds:.2f} s ({cpu:.2f} s of processor time)", seconds < limit)


SECTIONS = {"folder": to_folder, "in_place": in_place, "memory": memory, "shared": shared}


def section(name: str, suite: Suite) -> Iterator[Row]:
    try:
        yield from SECTIONS[name](suite)
    except NoRoomError as error:
        yield skipped(name, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="on the disk to be measured")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of everything that is timed")
    parser.add_argument("--shape", choices=SHARD_SIZES, default="slim", help="tiny: to see that the program works")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moemerge-bench-", dir=options.folder.resolve()) as folder:
        suite = Suite(Workshop(Path(folder)), options.shape, options.repeat)
        run([*MOEMERGE, "--help"])  # Python compiles modules once
        for name in options.only:
            rows.extend(section(name, suite))
    print(machine(options.folder))
    print(f"Medians of {options.repeat} rounds in turns, {time.perf_counter() - start:.0f} s in all.")
    print()
    print(as_markdown(rows) if options.markdown else as_text(rows))


if __name__ == "__main__":
    main()
