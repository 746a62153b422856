"""What tuning a mixture takes when it is held in memory, and when its layers are read from the disk.

    python benchmarks/make_models.py FOLDER --shape 1b --experts 4 && moemerge ... OUT
    ACCELERATE_MIXED_PRECISION=bf16 python benchmarks/tuning_memory.py OUT DATA --markdown

OUT is a merged model, DATA a file of at least ten documents. Prints seconds per step, peak memory, bytes read and how
these compare. Files come from the page cache where that has room for them.
"""

import argparse
import json
import sys
from pathlib import Path

from measure import run

# Nothing else is imported here: see measure.py.
PROGRAM = """
import sys
from dataclasses import replace
from moemerge.cli import main
from moemerge.tuning import running
find, streamed = running.plan_memory, sys.argv.pop() == "True"
running.plan_memory = lambda *given: replace(find(*given), streamed=streamed)
main()
"""
# So that nothing is written.
NO_CHANGE = ("--lr", "1e-30")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens-per-step", type=int, default=512)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    shown: list[tuple[str, ...]] = [("layers", "s/step", "peak memory", "read", "held-out loss")]
    found = []
    for streamed in (False, True):
        sizes = ["--steps", options.steps, "--tokens-per-step", options.tokens_per_step]
        words = ["tune", options.out, "--data", f"text={options.data}", *sizes, *NO_CHANGE, "--json"]
        words.append("--allow-missing-domains")
        took = run([sys.executable, "-c", PROGRAM, *map(str, words), "--device", "cpu", str(streamed)])
        facts = json.loads(took.output)
        seconds, loss = facts["seconds_per_step"], facts["after"]["mean_loss"]
        found.append((seconds, took.peak_bytes, took.read_bytes))
        name = "from the disk" if streamed else "in memory"
        shown.append((name, f"{seconds:.1f}", *(f"{count / 1e9:.2f} GB" for count in found[-1][1:]), f"{loss:.4f}"))
    ratios = [streamed / held for held, streamed in zip(*found, strict=True)]
    shown.append(("ratio", *(f"{ratio:.2f}" for ratio in ratios), ""))
    if options.markdown:
        shown.insert(1, ("---",) * 5)
    for cells in shown:
        print(f"| {' | '.join(cells)} |" if options.markdown else "  ".join(cell.ljust(14) for cell in cells))


if __name__ == "__main__":
    main()
