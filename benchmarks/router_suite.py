"""Routers from much and little evidence, on many sets of experts: what is recovered, regret, and text of no expert.

    python benchmarks/router_suite.py --models DIR ... --texts DIR ... --save losses.json --markdown

Each DIR of --models holds dense models by name, `base` among them; each DIR of --texts `NAME.calib.*`, which routers
may be fitted to, and `NAME.test.*`, which judges them. The sets are those of router_suite.yaml: `nobody` are texts that
no expert of the set is for, `switching` pairs whose texts take turns in one document. Losses are saved by document
after each row, and rows that are saved are not run again. docs/routers.md says what the tables mean.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from routers import as_rows
from table import machine, markdown_table, text_table

from moemerge import merge, plan_merge
from moemerge.chats import Document
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import BASE, MERGED, ORACLE, SOUP, UNIFORM, Sums, recovered
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.runnable import MixtureModel, Runnable, average, forced, open_dense, open_mixture, uniform
from moemerge.passes.compute_dtype import find_compute
from moemerge.routers.initialisation import init_routers
from moemerge.texts.documents import read_documents

HERE = Path(__file__).parent
OWN = "own dense expert"
# Method and evidence of each row; a number is of prompts, or of tokens for each expert.
WAYS = {
    "mergekit_hidden, 2 prompts": ("mergekit_hidden", "prompts", 2),
    "delta, weights alone": ("delta", "", 0),
    "ridge, 2 prompts": ("ridge", "prompts", 2),
    "ridge, texts, 4096 tokens": ("ridge", "texts", 4096),
    "combined, weights alone": ("combined", "", 0),
    "combined, 2 prompts": ("combined", "prompts", 2),
    "combined, text that experts write": ("combined", "written", 2),
    "combined, texts, 4096 tokens": ("combined", "texts", 4096),
    "combined, texts, 16384 tokens": ("combined", "texts", 16384),
    "combined, unsorted texts, 4096 tokens": ("combined", "unsorted", 4096),
}
RESAMPLINGS = 1000
SWITCH = 250  # characters of each domain in turn


@dataclass(frozen=True)
class Suite:
    models: list[Path]
    texts: list[Path]
    prompts: dict[str, list[str]]

    def model(self, name: str) -> str:
        return str(next(folder / name for folder in self.models if (folder / name).exists()))

    def text(self, name: str, kind: str) -> Path:
        return next(path for folder in self.texts for path in sorted(folder.glob(f"{name}.{kind}.*")))

    def test(self, name: str) -> list[Document]:
        return list(read_documents([self.text(name, "test")]))

    def config(self, asked: dict[str, Any], mode: str, given: str, amount: int) -> MergeConfig:
        experts = []
        router: dict[str, object] = {"tokens_per_expert": amount} if given in {"texts", "unsorted"} else {}
        for name in asked["experts"]:
            expert: dict[str, object] = {"source_model": self.model(name)}
            if given in {"prompts", "written"}:
                expert["positive_prompts"] = self.prompts[name][:amount]
            if given == "texts":
                expert["positive_texts"] = str(self.text(name, "calib"))
            experts.append(expert)
        if given == "written":
            router["calibration"] = "generate"
        if given == "unsorted":
            router["calibration_texts"] = [str(self.text(name, "calib")) for name in asked["experts"]]
        document = {
            "base_model": self.model("base"),
            "gate_mode": mode,
            "experts": experts,
            "experts_per_token": asked.get("per_token", 2),
            "dtype": "bfloat16",
            **({"router": router} if router else {}),
            **({"shared_weights": {"method": asked["shared_weights"]}} if "shared_weights" in asked else {}),
        }
        return parse_config(json.dumps(document))


@dataclass(frozen=True)
class Bench:
    """One set of experts, merged once; its routers are replaced in memory."""

    suite: Suite
    asked: dict[str, Any]
    folder: Path

    @cached_property
    def mixture(self) -> MixtureModel:
        merge(plan_merge(self.suite.config(self.asked, "random", "", 0)), self.folder)
        return open_mixture(self.folder)

    @property
    def extra(self) -> dict[str, list[Document]]:
        """Documents of domains that are no expert's: of nobody, and those that switch between two."""
        nobody = {f"nobody's: {name}": self.suite.test(name) for name in self.asked.get("nobody", [])}
        pairs = self.asked.get("switching", [])
        return nobody | {f"switching: {a}, {b}": switching(self.suite.test(a), self.suite.test(b)) for a, b in pairs}

    @cached_property
    def runs(self) -> Runs:
        documents = {name: self.suite.test(name) for name in self.asked["experts"]} | self.extra
        texts = Texts.cut(self.mixture, documents, self.asked.get("tokens", 2048), 512)
        compute = find_compute("cpu", "auto", self.mixture.runnable.layer_shapes)
        return Runs(texts, compute, lambda _name, _done, _total: None)

    def row(self, name: str) -> dict[str, Any]:
        """Losses by domain and document of a model or a way of making routers, with its accuracy and seconds."""
        if name in WAYS:
            return self._routed(name)
        if name == ORACLE:
            for place in range(len(self.asked["experts"])):
                self.runs.run(ORACLE, forced(self.mixture, place), domains=[place])
        elif name == OWN:
            for place, expert in enumerate(self.asked["experts"]):
                self.runs.run(OWN, open_dense(self.suite.model(expert), expert, print), domains=[place])
        elif name in self.asked["experts"]:
            domains = range(len(self.asked["experts"]), len(self.runs.texts.domains))
            self.runs.run(name, open_dense(self.suite.model(name), name, print), domains=domains)
        else:
            self.runs.run(name, self._baseline(name))
        return {"losses": as_lists(self.runs.sums[name])}

    def _baseline(self, name: str) -> Runnable:
        if name == BASE:
            return open_dense(self.suite.model("base"), name, print)
        experts = [open_dense(self.suite.model(expert), expert, print) for expert in self.asked["experts"]]
        made = uniform(self.mixture) if name == UNIFORM else average(name, experts)
        assert isinstance(made, Runnable), made
        return made

    def _routed(self, name: str) -> dict[str, Any]:
        plan = plan_merge(self.suite.config(self.asked, *WAYS[name]))
        start = time.perf_counter()
        routers = init_routers(plan.router_request, seed=0, progress=lambda _done, _total: None)
        seconds = time.perf_counter() - start
        count = len(self.asked["experts"])
        rows = as_rows(routers, count, "bfloat16")
        tally = RoutingTally(self.mixture, self.runs.texts)
        replaced = self.mixture.with_rows(name, rows.__getitem__)
        self.runs.run(name, replaced.runnable, mixture=replaced, chosen=tally.add)
        accuracy = [tally.of(place).accuracy for place in range(count)]
        return {"losses": as_lists(self.runs.sums[name]), "accuracy": accuracy, "seconds": seconds}


def switching(one: list[Document], other: list[Document]) -> list[Document]:
    """Documents in which pieces of two domains' documents take turns."""
    texts = ([text for text in documents if isinstance(text, str)] for documents in (one, other))
    return [
        "\n".join(a[at : at + SWITCH] + "\n" + b[at : at + SWITCH] for at in range(0, min(len(a), len(b)), SWITCH))
        for a, b in zip(*texts, strict=False)
    ]


def as_lists(sums: dict[str, Sums]) -> dict[str, list[list[float]]]:
    return {domain: found.tolist() for domain, found in sums.items()}


def wanted(asked: dict[str, Any]) -> list[str]:
    methods = asked.get("ways")
    extra = "nobody" in asked or "switching" in asked
    return [
        *(BASE, UNIFORM, ORACLE, SOUP, OWN),
        *(asked["experts"] if extra else ()),
        *(name for name, (method, *_) in WAYS.items() if methods is None or method in methods),
    ]


Results = dict[str, dict[str, dict[str, Any]]]


def run(suite: Suite, sets: dict[str, dict[str, Any]], save: Path) -> Results:
    """Run what is not saved yet; results by set and row."""
    results: Results = json.loads(save.read_text()) if save.exists() else {}
    for label, asked in sets.items():
        found = results.setdefault(label, {})
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(suite, asked, Path(folder) / "merged")
            for name in wanted(asked):
                if name not in found:
                    found[name] = bench.row(name)
                    kept = json.loads(save.read_text()) if save.exists() else {}  # another process may add other sets
                    save.write_text(json.dumps({**kept, label: found}))
                    print(f"{label}: {name}", flush=True)
    return results


def sums_of(found: dict[str, dict[str, Any]], name: str) -> dict[str, Sums]:
    """Sums of the domains that have an expert."""
    return {domain: np.array(of) for domain, of in found[name]["losses"].items() if domain in found[OWN]["losses"]}


def recovered_table(results: Results) -> Iterator[list[str]]:
    """What each way recovers on each set: of the gap between a uniform mixture and the label oracle, its share."""
    for name in (SOUP, *WAYS):
        cells = [name]
        for found in results.values():
            if name not in found:
                cells.append("-")
                continue
            losses = {UNIFORM: sums_of(found, UNIFORM), ORACLE: sums_of(found, ORACLE), MERGED: sums_of(found, name)}
            share = recovered(losses, list(losses[MERGED]))
            cells.append("-" if share is None else f"{share.value:.2f}{share.interval}")
        yield cells


def regret_table(results: Results, way: str) -> Iterator[list[str]]:
    """Nats by which the mixture is above each domain's own expert, and above the best single model of all."""
    for label, found in results.items():
        merged = sums_of(found, way)
        regrets = {domain: difference(merged[domain], sums_of(found, OWN)[domain]) for domain in merged}
        worst = max(regrets, key=lambda domain: regrets[domain][1])
        mean = {name: np.mean([loss(of) for of in sums_of(found, name).values()]) for name in (way, OWN, BASE, SOUP)}
        figures = [f"{mean[name]:.3f}" for name in (way, OWN, SOUP, BASE)]
        low, value, high = regrets[worst]
        yield [label, *figures, f"{worst} {value:+.3f} ({low:+.3f} to {high:+.3f})"]


def extra_table(results: Results, way: str) -> Iterator[list[str]]:
    """Losses on text of no expert and on text that switches, beside those of the models that it is made of."""
    for label, found in results.items():
        for domain in [domain for domain in found[way]["losses"] if domain not in found[OWN]["losses"]]:
            dense = {
                name: np.array(of["losses"][domain])
                for name, of in found.items()
                if set(of) == {"losses"} and domain in of["losses"] and name not in {UNIFORM, SOUP}
            }
            merged, soup = (np.array(found[name]["losses"][domain]) for name in (way, SOUP))
            best = min(dense, key=lambda name: loss(dense[name]))
            by_document = np.stack(list(dense.values()))
            chosen = by_document[by_document[:, :, 0].argmin(axis=0), np.arange(by_document.shape[1])]
            figures = [loss(merged), loss(np.array(found[BASE]["losses"][domain])), loss(soup), loss(chosen)]
            yield [label, domain, *(f"{figure:.3f}" for figure in figures), f"{best} {loss(dense[best]):.3f}"]


def loss(sums: Sums) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())


def difference(one: Sums, other: Sums) -> tuple[float, float, float]:
    """Lower end of the 95 % interval over documents, value and upper end of a difference of losses."""
    draws = np.random.default_rng(0).integers(len(one), size=(RESAMPLINGS, len(one)))
    found = [loss(one[drawn]) - loss(other[drawn]) for drawn in draws]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), loss(one) - loss(other), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--suite", type=Path, default=HERE / "router_suite.yaml")
    parser.add_argument("--prompts", type=Path, default=HERE / "router_prompts.yaml")
    parser.add_argument("--set", action="append", default=[], help="the name of a set; all without it")
    parser.add_argument("--save", type=Path, required=True, help="a JSON file that keeps the losses of each row")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    sets = yaml.safe_load(options.suite.read_text())["sets"]
    chosen = {name: asked for name, asked in sets.items() if not options.set or name in options.set}
    prompts = yaml.safe_load(options.prompts.read_text())
    results = run(Suite(options.models, options.texts, prompts), chosen, options.save)
    results = {name: results[name] for name in chosen}
    show = markdown_table if options.markdown else text_table
    print(machine(options.save.parent))
    print(show(["routers from", *results], list(recovered_table(results))))
    way = "combined, texts, 4096 tokens"
    heads = ["set", "text", "merged", BASE, SOUP, "best dense model of each document", "best dense model"]
    print(show(heads, list(extra_table(results, way))))
    print(show(["set", "merged", OWN, SOUP, BASE, "largest regret"], list(regret_table(results, way))))


if __name__ == "__main__":
    main()
