"""Merges from the Hub, and to it: bytes over the wire, disk, memory and time of each way, beside what the plan said.

    python benchmarks/hub.py --folder FOLDER --repeat 3 --markdown

Linux only. The Hub is that of the tests, on this machine: `docs/hub.md` says what that shows and what it does not.
Models are made in a new folder inside FOLDER and removed again; each merge begins with an empty cache of its own. This
program imports the standard library alone: see `measure.py`.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hub_process import Counts, HubProcess, serving
from measure import SAMPLE_SECONDS, Run, run
from table import HEADINGS, Row, machine, markdown_table, text_table
from workshop import GIGABYTES, MOEMERGE, Workshop, merged_gigabytes, say, warm

EXPERTS = 4
# So that a merge has several.
SHARD_SIZES = {"tiny": "200kB", "1b": "1GB"}
PUSH = ("--push", "bench/merged", "--license", "apache-2.0")
WAYS = {
    "cached": (),
    "streamed": ("--stream",),
    "cached, then pushed": PUSH,
    "streamed, pushed by shard": ("--stream", "--push-streaming", *PUSH),
}
MODES = ("random", "ridge")
LARGE = (("7b", 4), ("70b", 8))
DISK_TOLERANCE = 1.01
MEMORY_RATIO = 1.15
# Of what is cached, copied and made beside weights, with folders, links and a tokenizer without meaning.
SMALL_FILES_BYTES = 1_000_000
TAKEN_HEADINGS = (
    "merge",
    "way",
    "weights from the Hub",
    "to the Hub",
    "disk",
    "memory",
    "time",
    "requests to the Hub / to its storage",
)
WORKED_OUT_HEADINGS = (
    "merge",
    "to download: cached",
    "streamed",
    "disk: cached",
    "streamed",
    "streamed, pushed by shard",
    "memory",
)


@dataclass(frozen=True)
class Taken:
    """What one merge took."""

    run: Run
    counts: Counts


@dataclass(frozen=True)
class Fixture:
    shop: Workshop
    hub: HubProcess
    repeat: int

    def once(self, options: list[str | Path]) -> Taken:
        """Run moemerge with an empty cache, in a folder that is removed afterwards."""
        work = self.shop.folder / "work"
        work.mkdir()
        places = {"HF_HOME": work / "home", "HF_HUB_CACHE": work / "cache", "TMPDIR": work}
        told = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"} | self.hub.environment
        try:
            found = run([*MOEMERGE, *options], told | {name: str(path) for name, path in places.items()}, work)
            return Taken(found, self.hub.counts())
        finally:
            shutil.rmtree(work)

    def plan(self, config: Path, *options: str) -> tuple[dict[str, Any], Taken]:
        taken = self.once(["plan", config, "--json", "--quiet", *options])
        return json.loads(taken.run.output), taken


def merges(fixture: Fixture, shape: str, mode: str, models: Path) -> tuple[list[tuple[str, ...]], list[Row]]:
    """Every way in turns: what each took, and how that compares with the plan."""
    shop, shards = fixture.shop, SHARD_SIZES[shape]
    config = shop.config(Path(models.name), EXPERTS, mode)
    plan, planned = fixture.plan(config, "--max-shard-size", shards)
    taken: dict[str, list[Taken]] = {way: [] for way in WAYS}
    for number in range(fixture.repeat):
        for way, options in WAYS.items():
            # Cache and output, and what is pushed.
            shop.need(EXPERTS * GIGABYTES[shape][0] + 2 * merged_gigabytes(shape, EXPERTS), f"{mode}, {way}")
            warm(models)
            merge: list[str | Path] = [
                config,
                shop.folder / "work" / "out",
                "--device",
                "cpu",
                "--max-shard-size",
                shards,
                "--quiet",
            ]
            taken[way].append(fixture.once([*merge, *options]))
            say(f"round {number + 1}: {mode}, {way}: {taken[way][-1].run.seconds:.1f} s")
    name = f"{EXPERTS} x {shape}, {mode}"
    return [overview(name, way, found) for way, found in taken.items()], [
        exact_row(
            f"{name}, plan: weights from the Hub are headers and rows to compare", peeked(plan, models), [planned], sent
        ),
        *targets(name, plan, taken, models),
    ]


def sent(taken: Taken) -> int:
    return taken.counts.weights_sent


def received(taken: Taken) -> int:
    return taken.counts.received


def overview(name: str, way: str, found: list[Taken]) -> tuple[str, ...]:
    seconds = [one.run.seconds for one in found]
    spread = f" ({min(seconds):.0f} to {max(seconds):.0f})" if len(found) > 1 else ""
    requests = found[0].counts.requests
    return (
        name,
        way,
        size(sent(found[0])),
        size(received(found[0])),
        size(disk(found)),
        f"{memory(found) / 1e6:.0f} MB",
        f"{median(seconds):.0f} s{spread}",
        f"{requests['hub']} / {requests['cdn'] + requests['uploads']}",
    )


def targets(name: str, plan: dict[str, Any], taken: dict[str, list[Taken]], models: Path) -> Iterator[Row]:
    headers, weights = peeked(plan, models), sum(shard["bytes"] for shard in plan["shards"])
    two_shards = sum(sorted(shard["bytes"] for shard in plan["shards"])[-2:])
    streamed = plan["download_bytes"] + headers
    # An empty repository of the Hub holds tokenizers in LFS.
    uploaded = weights + (models / "base" / "tokenizer.json").stat().st_size
    for way, found in taken.items():
        what = f"{name}, {way}"
        streams, pushes_shards = "--stream" in WAYS[way], "--push-streaming" in WAYS[way]
        bytes_from_hub = streamed if streams else plan["remote_bytes"] + headers
        yield exact_row(f"{what}: weights from the Hub as planned, and headers", bytes_from_hub, found, sent)
        if "--push" in WAYS[way]:
            yield exact_row(f"{what}: to the Hub: shards and tokenizer", uploaded, found, received)
        room = plan["kept_bytes"] if streams else plan["remote_bytes"]
        room += two_shards if pushes_shards else weights
        made_of = ("kept bytes" if streams else "downloads") + (
            " + the two largest shards" if pushes_shards else " + output"
        )
        yield Row(
            f"{what}: disk, of {made_of}",
            f"<= {size(room)} + 1 % + {size(SMALL_FILES_BYTES)}",
            size(disk(found)),
            disk(found) <= room * DISK_TOLERANCE + SMALL_FILES_BYTES,
        )
        if streams:
            other = taken["cached, then pushed" if pushes_shards else "cached"]
            ratio = memory(found) / memory(other)
            measured = f"{ratio:.2f} ({memory(found) / 1e6:.0f} MB / {memory(other) / 1e6:.0f} MB)"
            yield Row(f"{what}: memory / cached", f"<= {MEMORY_RATIO}", measured, ratio <= MEMORY_RATIO)
            seconds, theirs = (median(one.run.seconds for one in each) for each in (found, other))
            yield Row(f"{what}: time / cached", "-", f"{seconds / theirs:.2f} ({seconds:.0f} s / {theirs:.0f} s)")


def exact_row(what: str, expected: int, found: list[Taken], value: Any) -> Row:
    """Every round has to give the number."""
    values = sorted({value(one) for one in found})
    return Row(what, f"{expected:,} bytes", ", ".join(f"{n:,}" for n in values), values == [expected])


def disk(found: list[Taken]) -> int:
    return max(one.run.disk_bytes for one in found)


def memory(found: list[Taken]) -> int:
    return max(one.run.peak_bytes for one in found)


def peeked(plan: dict[str, Any], models: Path) -> int:
    """What a plan reads of weights: headers, and the rows by which experts are compared with the base."""
    return header_bytes(models) + int(plan["compared_bytes"])


def header_bytes(models: Path) -> int:
    """Of all files of weights, their headers with the 8 bytes that say how long each is."""
    total = 0
    for path in models.rglob("*.safetensors"):
        with path.open("rb") as file:
            total += 8 + int.from_bytes(file.read(8), "little")
    return total


def worked_out(fixture: Fixture, models: Path, shape: str, experts: int, mode: str) -> tuple[tuple[str, ...], Row]:
    """What the plan says of models that are too large to be merged here; only their headers are real."""
    config = fixture.shop.config(Path(models.name), experts, mode)
    plan, taken = fixture.plan(config)
    two_shards = sum(sorted(shard["bytes"] for shard in plan["shards"])[-2:])
    remote, output, kept = plan["remote_bytes"], plan["output_bytes"], plan["kept_bytes"]
    numbers = (remote, plan["download_bytes"], remote + output, output + kept, kept + two_shards)
    name = f"{experts} x {shape}, {mode}"
    row = exact_row(
        f"{name}, plan: weights from the Hub are headers and rows to compare", peeked(plan, models), [taken], sent
    )
    return (name, *map(size, numbers), size(plan["peak_memory_bytes"])), row


def size(nbytes: float) -> str:
    if nbytes < 1e9:
        return f"{nbytes / 1e6:.{0 if nbytes >= 100e6 else 2}f} MB" if nbytes else "-"
    return f"{nbytes / 1e9:.2f} GB" if nbytes < 100e9 else f"{nbytes / 1e9:.0f} GB"


def place(models: Path, served: Path, name: str) -> Path:
    """Have models served as `name/base`, `name/expert0` and so on."""
    served.mkdir(exist_ok=True)
    (served / name).symlink_to(models)
    return served / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="on the disk to be measured")
    parser.add_argument("--shape", choices=SHARD_SIZES, default="1b", help="tiny: to see that the program works")
    parser.add_argument("--gate-mode", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--repeat", type=int, default=1, help="rounds, in which all ways take their turn")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    table = markdown_table if options.markdown else text_table
    took: list[tuple[str, ...]] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moemerge-bench-", dir=options.folder.resolve()) as folder:
        shop, served = Workshop(Path(folder)), Path(folder) / "served"
        for shape, experts in LARGE:
            place(shop.models(shape, experts, sparse=True), served, f"bench-{shape}")
        models = place(shop.models(options.shape, EXPERTS), served, "bench")  # last: else they make room for others
        run([*MOEMERGE, "--help"])  # Python compiles modules once
        with serving(served, Path(folder) / "store") as hub:
            fixture = Fixture(shop, hub, options.repeat)
            for mode in options.gate_mode:
                more, compared = merges(fixture, options.shape, mode, models)
                took += more
                rows += compared
            large = [
                worked_out(fixture, served / f"bench-{shape}", shape, experts, mode)
                for shape, experts in LARGE
                for mode in options.gate_mode
            ]
    rows += [row for _, row in large]
    print(machine(options.folder))
    print(f"Measured, {options.repeat} round(s); disk is looked up every {SAMPLE_SECONDS * 1000:.0f} ms:\n")
    print(table(TAKEN_HEADINGS, took), "\n")
    print("The same beside what was expected:\n")
    print(table(HEADINGS, [row.cells for row in rows]), "\n")
    print("Worked out by the plan, not measured:\n")
    print(table(WORKED_OUT_HEADINGS, [line for line, _ in large]))


if __name__ == "__main__":
    main()
