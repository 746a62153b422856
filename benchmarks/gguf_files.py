"""Memory and time of GGUF files: straight from a plan, and from its checkpoint.

    python benchmarks/gguf_files.py FOLDER --shape 7b --types bf16 q8_0

FOLDER gets sparse models, which hold zeros and take no room, and one file at a time, which takes all of its own: 13 GB
with q8_0 for two experts of the 7B shape. `--checkpoint` writes the checkpoint first, which is as large as a 16-bit
file, and measures `moemerge gguf` on it too.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from measure import Run, run

TYPES = ("f32", "f16", "bf16", "q8_0")
TARGET_BYTES = 500_000_000


def rows(options: argparse.Namespace) -> Iterator[tuple[str, str, str, str, str]]:
    config = options.folder / "merge.yaml"
    experts = [{"source_model": str(options.folder / f"expert{number}")} for number in range(options.experts)]
    document = {"base_model": str(options.folder / "base"), "experts": experts, "gate_mode": "random"}
    config.write_text(json.dumps(document))
    program = [sys.executable, "-m", "moemerge"]
    quiet = ["--quiet", "--overwrite"]
    checkpoint, file = options.folder / "merged", options.folder / "merged.gguf"
    identical = ["--allow-identical-experts"]
    for kind in options.types:
        words = [*program, config, file, "--type", kind, *quiet, *identical]
        yield told(f"plan -> {kind}", file, run(words))
        file.unlink()  # two at a time might be too much for the disk
    if options.checkpoint:
        run([*program, config, checkpoint, *quiet, *identical])
        for kind in options.types:
            yield told(f"checkpoint -> {kind}", file, run([*program, "gguf", checkpoint, file, "--type", kind, *quiet]))
            file.unlink()


def told(what: str, file: Path, found: Run) -> tuple[str, str, str, str, str]:
    size, met = file.stat().st_size, found.peak_bytes < TARGET_BYTES
    return (
        what,
        f"{size / 1e9:.2f} GB",
        f"{found.seconds:.1f} s",
        f"{found.cpu_seconds:.1f} s",
        f"{found.peak_bytes / 1e6:.0f} MB{'' if met else ': over 500 MB'}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["q8_0"])
    parser.add_argument("--checkpoint", action="store_true", help="measure `moemerge gguf` too")
    options = parser.parse_args()
    folder, made = options.folder, Path(__file__).with_name("make_models.py")
    # Another process makes them: this one's memory counts to the peaks.
    run([sys.executable, made, folder, "--shape", options.shape, "--experts", str(options.experts), "--sparse"])
    heads = ("what", "file", "time", "processor", "peak memory")
    for row in chain([heads], rows(options)):
        print("  ".join(cell.ljust(20) for cell in row).rstrip(), flush=True)


if __name__ == "__main__":
    main()
