"""What tuning gains, from random routers and from those made in closed form, on texts that it never saw.

    python benchmarks/tuning.py MODELS TEXTS --markdown

MODELS and TEXTS are as in benchmarks/routers.py: routers are made from and tuned on `EXPERT.calib.txt`, and judged by
`EXPERT.test.txt`. Losses are computed in float32 whatever the tuning computes in (ACCELERATE_MIXED_PRECISION).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expert_sets import run_baseline
from routers import show
from table import machine

from moemerge import merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import MERGED, ORACLE, UNIFORM, estimate, recovered
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.runnable import open_mixture
from moemerge.passes.compute_dtype import Compute
from moemerge.texts.documents import read_documents
from moemerge.tuning.settings import Settings, TuningResult
from moemerge.tuning.tuner import tune

# Name of the row, the routers at first, and the options.
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("gates", "random", {}),
    ("gates, distilled", "random", {"distil": True}),
    ("gates, distilled", "ridge", {"distil": True}),
    ("gates", "ridge", {}),
    ("gates,norms", "ridge", {"train": "gates,norms"}),
    ("phatgoose", "random", {"method": "phatgoose"}),
    ("gates, noise 0.5", "random", {"noise": 0.5}),
    ("gates, noise 0.5", "ridge", {"noise": 0.5}),
)


def merged(options: argparse.Namespace, experts: list[str], way: str, out: Path) -> Path:
    entries = [{"source_model": str(options.models / name)} for name in experts]
    if way == "ridge":
        for entry, name in zip(entries, experts, strict=True):
            entry["positive_texts"] = str(options.texts / f"{name}.calib.txt")
    document = {"base_model": str(options.models / "base"), "gate_mode": way, "experts": entries, "dtype": "bfloat16"}
    merge(plan_merge(parse_config(json.dumps(document))), out)
    return out


def line(name: str, runs: Runs, tally: RoutingTally | None, tuned: TuningResult | None) -> list[str]:
    """Cells of a row: losses with intervals, mean, recovered fraction, accuracy, best step, seconds per step."""
    found = {domain: estimate(runs.sums[name][domain]) for domain in runs.texts.domains}
    share = recovered({**runs.sums, MERGED: runs.sums[name]}, runs.texts.domains)
    places = range(len(runs.texts.domains))
    kept = "" if tuned and tuned.improved else ", not kept: the row is of the routers before"
    return [
        name,
        *(f"{one.value:.3f}{one.interval}" for one in found.values()),
        f"{np.mean([one.value for one in found.values()]):.3f}",
        "-" if share is None else f"{share.value:.2f}{share.interval}",
        f"{np.mean([tally.of(place).accuracy for place in places]):.3f}" if tally else "-",
        f"{tuned.before.mean_loss:.3f} -> {tuned.after.mean_loss:.3f}, step {tuned.step}{kept}" if tuned else "-",
        f"{tuned.seconds_per_step:.1f}" if tuned and tuned.seconds_per_step else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="of test text, for each expert")
    parser.add_argument("--window", type=int, default=512, help="of test text, in tokens")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--row", type=int, action="append", default=[], help="one of the tunings; all without it")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    experts = sorted(path.name for path in options.models.iterdir() if path.is_dir() and path.name != "base")
    data = {name: [str(options.texts / f"{name}.calib.txt")] for name in experts}
    rows = [ROWS[number] for number in options.row] or list(ROWS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts = {way: merged(options, experts, way, folder / way) for way in dict.fromkeys(row[1] for row in rows)}
        first = open_mixture(next(iter(starts.values())))
        documents = {name: read_documents([options.texts / f"{name}.test.txt"]) for name in experts}
        texts = Texts.cut(first, documents, options.tokens, options.window)
        runs = Runs(texts, Compute(torch.device("cpu"), torch.float32), lambda _name, _done, _total: None)
        print(f"{machine(folder)}, tuned in {os.environ.get('ACCELERATE_MIXED_PRECISION', 'float32')}")
        heads = ["routers", *experts, "mean", "recovered", "right first", "held out while tuning", "s/step"]
        show(heads, options)
        if options.markdown:
            show(["---"] * len(heads), options)
        for baseline in (UNIFORM, ORACLE):
            run_baseline(baseline, runs, first)
        for baseline in (UNIFORM, ORACLE):
            show(line(baseline, runs, None, None), options)
        for way, model in starts.items():
            show(judged(way, model, runs, None), options)
        for what, way, given in rows:
            settings = Settings(steps=options.steps, seed=options.seed, lr=options.lr, **given)
            copy = folder / "tuned"
            found = tune(
                starts[way],
                data,
                settings,
                copy=copy,
                device="cpu",
                announce=lambda line: print(line, file=sys.stderr, flush=True),
            )
            assert found, "nothing was cut off"
            show(judged(f"{way}, {what}", Path(found.model), runs, found), options)
            if copy.exists():
                copy.rename(folder / f"{way}, {what}")


def judged(name: str, model: Path, runs: Runs, tuned: TuningResult | None) -> list[str]:
    mixture = open_mixture(model)
    tally = RoutingTally(mixture, runs.texts)
    runs.run(name, mixture.runnable, mixture=mixture, tally=tally)
    return line(name, runs, tally, tuned)


if __name__ == "__main__":
    main()
