"""What the analysis of text takes, beside a plain pass in which all experts compute all tokens.

    python benchmarks/analysis_text.py OUT DATA --markdown

OUT is a mixture, DATA a file of documents. Both run a layer at a time over the same tokens, in turns; the shortest of
`--repeat` times counts. Prints seconds, peak memory and bytes read, and how these compare.
"""

import argparse
import sys
from pathlib import Path

from measure import Run, run

# Nothing else is imported here: see measure.py.
PROGRAM = """
import sys
from dataclasses import replace
from time import perf_counter, process_time
from moemerge.cli.console import return_freed_memory
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.evaluator import read_domains
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.families.stored_mixture import per_token_key
from moemerge.passes.compute_dtype import find_compute
way, out, data, tokens, dtype = sys.argv[1:]
return_freed_memory()
mixture = open_mixture(out)
compute = find_compute("cpu", dtype, mixture.runnable.layer_shapes)
texts = Texts.cut(mixture, read_domains({"text": [data]}), int(tokens), 512)
start, busy = perf_counter(), process_time()
if way == "all experts":
    keys = {**mixture.runnable.keys, per_token_key(mixture.family): len(mixture.experts)}
    run_model(replace(mixture.runnable, keys=keys), texts.windows, compute, losses=False)
elif way == "plain":
    run_model(mixture.runnable, texts.windows, compute, losses=False)
else:
    from moemerge.analysis.text import analyze_text
    analyze_text(mixture, texts, compute)
print(perf_counter() - start, process_time() - busy)
"""
WAYS = ("plain", "all experts", "analysis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    runs: dict[str, Run] = {}
    for _ in range(options.repeat):
        for way in WAYS:
            words = [way, options.out, options.data, options.tokens, options.dtype]
            runs[way] = run([sys.executable, "-c", PROGRAM, *map(str, words)])
            seconds, busy = map(float, runs[way].output.split())
            times[way].append((seconds, busy))
    best = {way: [min(column) for column in zip(*found, strict=True)] for way, found in times.items()}
    ratio = "to all experts"
    shown: list[tuple[str, ...]] = [("pass", "seconds", ratio, "of processor", ratio, "peak memory", "read")]
    for way, took in best.items():
        spans = [(f"{one:.1f}", f"{one / every:.2f}") for one, every in zip(took, best["all experts"], strict=True)]
        sizes = (f"{count / 1e9:.2f} GB" for count in (runs[way].peak_bytes, runs[way].read_bytes))
        shown.append((way, *spans[0], *spans[1], *sizes))
    if options.markdown:
        shown.insert(1, ("---",) * len(shown[0]))
    for cells in shown:
        print(f"| {' | '.join(cells)} |" if options.markdown else "  ".join(cell.ljust(18) for cell in cells))


if __name__ == "__main__":
    main()
