"""What the shared half of a mixture is worth: attention and norms mixed by several methods, norms folded or not.

    python benchmarks/parts.py MODELS TEXTS --markdown

MODELS and TEXTS are as for benchmarks/routers.py. Each method is merged, with routers fitted to the texts on its own
weights, and run with these routers and with the label oracle's choices; what is recovered is relative to the first row,
between all its experts alike and its oracle. docs/quality.md says what the rows mean; intervals are over documents,
those of differences over the same documents drawn for both.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from routers import show
from table import machine

from moemerge import merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.evaluation.baselines import average, forced, uniform
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import MERGED, ORACLE, SOUP, UNIFORM, difference, estimate, recovered
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.runnable import Runnable, open_dense, open_mixture
from moemerge.merging.options import MergeOptions
from moemerge.passes.compute_dtype import Compute
from moemerge.texts.documents import read_documents

CPU = Compute(torch.device("cpu"), torch.float32)
DENSE_OWN = "each domain's own dense expert"
WAYS: dict[str, dict[str, Any]] = {
    "base": {},
    "average": {"shared_weights": "average"},
    "average, folded norms": {"shared_weights": "average", "fold_norms": True},
    "base, folded norms": {"fold_norms": True},
    "ties, density 0.5": {"shared_weights": {"method": "ties", "density": 0.5}},
    "ties, density 0.2": {"shared_weights": {"method": "ties", "density": 0.2}},
    "dare, density 0.5": {"shared_weights": {"method": "dare", "density": 0.5}},
}


def config(options: argparse.Namespace, experts: dict[str, str], **keys: Any) -> Any:
    document = {
        "base_model": str(options.models / "base"),
        "gate_mode": "ridge",
        "dtype": "bfloat16",
        "experts_per_token": options.per_token,
        "experts": [
            {"source_model": model, "positive_texts": str(options.texts / f"{name}.calib.txt")}
            for name, model in experts.items()
        ],
        **keys,
    }
    return parse_config(json.dumps(document))


def cells(name: str, sums: dict[str, Any], domains: list[str], *more: str) -> list[str]:
    found = [estimate(sums[domain]) for domain in domains]
    mean = np.mean([loss.value for loss in found])
    return [name, *(f"{loss.value:.3f}{loss.interval}" for loss in found), f"{mean:.3f}", f"{np.exp(mean):.2f}", *more]


def beside(one: dict[str, Any], other: dict[str, Any]) -> str:
    found = difference(one, other)
    return f"{found.value:+.3f}" + ("" if found.low is None else f" ({found.low:+.3f} to {found.high:+.3f})")


def rows(options: argparse.Namespace, experts: dict[str, str], folder: Path) -> Iterator[list[str]]:
    domains = list(experts)
    first: Runs | None = None
    for name, keys in WAYS.items():
        if options.method and name not in options.method:
            continue
        merge(plan_merge(config(options, experts, **keys)), folder / "merged", MergeOptions(overwrite=True))
        mixture = open_mixture(folder / "merged")
        documents = {domain: read_documents([options.texts / f"{domain}.test.txt"]) for domain in domains}
        runs = Runs(Texts.cut(mixture, documents, options.tokens, options.window), CPU, lambda *_: None)
        if first is None:
            first = runs
            dense = {expert: open_dense(model, expert, print) for expert, model in experts.items()}
            for domain in domains:
                runs.run(DENSE_OWN, dense[domain], domains=[domains.index(domain)])
            soup = average(SOUP, list(dense.values()))
            if isinstance(soup, Runnable):
                runs.run(SOUP, soup)
            for baseline in (DENSE_OWN, SOUP):
                yield [*cells(baseline, runs.sums[baseline], domains), *["-"] * 4]
            even = uniform(mixture)
            if isinstance(even, Runnable):
                runs.run(UNIFORM, even)
        for place in range(len(domains)):
            runs.run(ORACLE, forced(mixture, place), domains=[place])
        tally = RoutingTally(mixture, runs.texts)
        runs.run(MERGED, mixture.runnable, mixture=mixture, tally=tally)
        share = recovered({**first.sums, MERGED: runs.sums[MERGED]}, runs.texts.domains)
        right = np.mean([tally.of(place).accuracy for place in range(len(domains))])
        yield cells(
            name,
            runs.sums[MERGED],
            domains,
            f"{np.mean([estimate(runs.sums[ORACLE][domain]).value for domain in domains]):.3f}",
            "-" if share is None else f"{share.value:.2f}{share.interval}",
            f"{right:.3f}",
            beside(runs.sums[MERGED], first.sums[DENSE_OWN]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tokens", type=int, default=8192, help="of test text, for each expert")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--method", action="append", default=[], help="a row of the table; all without it")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    experts = {
        path.name: str(path) for path in sorted(options.models.iterdir()) if path.is_dir() and path.name != "base"
    }
    with tempfile.TemporaryDirectory() as name:
        print(machine(Path(name)))
        heads = [
            "shared weights",
            *experts,
            "mean",
            "perplexity",
            "label oracle",
            "recovered",
            "right first",
            "loss beside each domain's own dense expert",
        ]
        show(heads, options)
        if options.markdown:
            show(["---"] * len(heads), options)
        for row in rows(options, experts, Path(name)):
            show(row, options)


if __name__ == "__main__":
    main()
