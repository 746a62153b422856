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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from expert_sets import ExpertSet, run_baseline
from published_routers import dume_rows, phatgoose_rows
from suite_tables import OWN, Results, tables
from table import machine, markdown_table, text_table

from moemerge import merge, plan_merge
from moemerge.chats import Document
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import BASE, ORACLE, SOUP, UNIFORM, Sums
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.runnable import MixtureModel, Runnable, open_dense, open_mixture
from moemerge.families.stored_mixture import per_token_key
from moemerge.passes.compute_dtype import find_compute
from moemerge.texts.documents import read_documents

HERE = Path(__file__).parent
DUME, PHATGOOSE = "DUME's form", "PHATGOOSE"
TEXTS: Final = 4096
# Method, evidence, and settings of the router of each row.
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mergekit_hidden, 2 prompts": ("mergekit_hidden", "prompts", {}),
    "delta, weights alone": ("delta", "", {}),
    "ridge, 2 prompts": ("ridge", "prompts", {}),
    "ridge, texts, 4096 tokens": ("ridge", "texts", {"tokens_per_expert": TEXTS}),
    "DUME's form, top 1, texts, 4096 tokens": (DUME, "texts", {"tokens_per_expert": TEXTS}),
    "PHATGOOSE, texts, 4096 tokens": (PHATGOOSE, "texts", {}),
    "combined, weights alone": ("combined", "", {}),
    "combined, 2 prompts": ("combined", "prompts", {}),
    "combined, text that experts write": ("combined", "prompts", {"calibration": "generate"}),
    "combined, texts, 4096 tokens": ("combined", "texts", {"tokens_per_expert": TEXTS}),
    "combined, texts, 16384 tokens": ("combined", "texts", {"tokens_per_expert": 4 * TEXTS}),
    "combined, unsorted texts, 4096 tokens": ("combined", "unsorted", {"tokens_per_expert": TEXTS}),
}
PROMPTS: Final = 2
DOCUMENTS: Final = 8  # of each domain, at least: windows are short enough that so many are read, if there are so many
SWITCH: Final = 250  # characters of each domain in turn


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

    def experts(self, asked: dict[str, Any]) -> ExpertSet:
        names = asked["experts"]
        return ExpertSet(
            self.model("base"),
            {name: self.model(name) for name in names},
            {name: str(self.text(name, "calib")) for name in names},
            {name: self.prompts[name][:PROMPTS] for name in names},
            asked.get("per_token", 2),
            asked.get("shared_weights", "base"),
        )


@dataclass(frozen=True)
class Bench:
    """One set of experts, merged once; its routers are replaced in memory."""

    suite: Suite
    asked: dict[str, Any]
    folder: Path

    @cached_property
    def experts(self) -> ExpertSet:
        return self.suite.experts(self.asked)

    @cached_property
    def mixture(self) -> MixtureModel:
        merge(plan_merge(self.experts.config("random", "")), self.folder / "merged")
        return open_mixture(self.folder / "merged")

    @property
    def extra(self) -> dict[str, list[Document]]:
        """Documents of domains that are no expert's: of nobody, and those that switch between two."""
        nobody = {f"nobody's: {name}": self.suite.test(name) for name in self.asked.get("nobody", [])}
        pairs = self.asked.get("switching", [])
        return nobody | {f"switching: {a}, {b}": switching(self.suite.test(a), self.suite.test(b)) for a, b in pairs}

    @cached_property
    def runs(self) -> Runs:
        documents = {name: self.suite.test(name) for name in self.asked["experts"]} | self.extra
        tokens = self.asked.get("tokens", 2048)
        texts = Texts.cut(self.mixture, documents, tokens, max(tokens // DOCUMENTS, 1))
        compute = find_compute("cpu", "auto", self.mixture.runnable.layer_shapes)
        return Runs(texts, compute, lambda _name, _done, _total: None)

    def row(self, name: str) -> dict[str, Any]:
        """Losses by domain and document of a model or a way of making routers, with its accuracy and seconds."""
        if name in WAYS:
            return self._routed(name)
        experts = self.experts.models
        if name == OWN:
            for place, expert in enumerate(experts):
                self.runs.run(OWN, self._dense(expert), domains=[place])
        elif name in experts:
            self.runs.run(name, self._dense(name), domains=range(len(experts), len(self.runs.texts.domains)))
        elif name == BASE:
            self.runs.run(BASE, open_dense(self.experts.base, BASE, print))
        else:
            run_baseline(name, self.runs, self.mixture, [self._dense(expert) for expert in experts])
        return {"losses": as_lists(self.runs.sums[name])}

    def _dense(self, expert: str) -> Runnable:
        return open_dense(self.experts.models[expert], expert, print)

    def _routed(self, name: str) -> dict[str, Any]:
        start = time.perf_counter()
        mixture, rows = self._rows(name)
        seconds = time.perf_counter() - start
        tally = RoutingTally(mixture, self.runs.texts)
        replaced = mixture.with_rows(name, rows.__getitem__)
        self.runs.run(name, replaced.runnable, mixture=replaced, tally=tally)
        accuracy = [tally.of(place).accuracy for place in range(len(mixture.experts))]
        return {"losses": as_lists(self.runs.sums[name]), "accuracy": accuracy, "seconds": seconds}

    def _rows(self, name: str) -> tuple[MixtureModel, dict[int, torch.Tensor]]:
        """The mixture that a way's rows (expert, hidden) by layer are for, and these."""
        mode, given, router = WAYS[name]
        if mode == PHATGOOSE:
            copy = self.folder / "phatgoose"
            return self.mixture, phatgoose_rows(self.mixture, self.experts.texts, TEXTS, self.runs.compute, copy)
        if mode == DUME:
            config = self.experts.config("ridge", given, **router)
            return with_one_expert(self.mixture), dume_rows(config, self.runs.compute)
        return self.mixture, self.experts.rows(self.experts.config(mode, given, **router), compute_dtype="auto")[0]


def with_one_expert(mixture: MixtureModel) -> MixtureModel:
    """The same mixture with one expert per token."""
    keys = {**mixture.runnable.keys, per_token_key(mixture.family): 1}
    return replace(mixture, experts_per_token=1, runnable=replace(mixture.runnable, keys=keys))


def switching(one: list[Document], other: list[Document]) -> list[Document]:
    """Documents in which pieces of two domains' documents take turns."""
    texts = ([text for text in documents if isinstance(text, str)] for documents in (one, other))
    return [
        "\n".join(a[at : at + SWITCH] + "\n" + b[at : at + SWITCH] for at in range(0, min(len(a), len(b)), SWITCH))
        for a, b in zip(*texts, strict=False)
    ]


def as_lists(sums: dict[str, Sums]) -> dict[str, list[list[float]]]:
    return {domain: found.tolist() for domain, found in sums.items()}


def wanted(asked: dict[str, Any], chosen: list[str]) -> list[str]:
    """Names of a set's rows; of ways those that are chosen, or all of them that the set asks for."""
    methods = asked.get("ways")
    extra = "nobody" in asked or "switching" in asked
    ways = [name for name, (method, *_) in WAYS.items() if methods is None or method in methods]
    return [
        *(BASE, UNIFORM, ORACLE, SOUP, OWN),
        *(asked["experts"] if extra else ()),
        *(name for name in ways if not chosen or name in chosen),
    ]


def run(suite: Suite, sets: dict[str, dict[str, Any]], save: Path, chosen: list[str]) -> Results:
    """Run what is not saved yet; results by set and row."""
    results: Results = json.loads(save.read_text()) if save.exists() else {}
    for label, asked in sets.items():
        found = results.setdefault(label, {})
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(suite, asked, Path(folder))
            for name in wanted(asked, chosen):
                if name not in found:
                    found[name] = bench.row(name)
                    kept = json.loads(save.read_text()) if save.exists() else {}  # another process may add other sets
                    save.write_text(json.dumps({**kept, label: found}))
                    print(f"{label}: {name}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--suite", type=Path, default=HERE / "router_suite.yaml")
    parser.add_argument("--prompts", type=Path, default=HERE / "router_prompts.yaml")
    parser.add_argument("--set", action="append", default=[], help="the name of a set; all without it")
    parser.add_argument("--way", action="append", default=[], help="the name of a way of making routers; all without")
    parser.add_argument("--save", type=Path, required=True, help="a JSON file that keeps the losses of each row")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    sets = yaml.safe_load(options.suite.read_text())["sets"]
    chosen = {name: asked for name, asked in sets.items() if not options.set or name in options.set}
    prompts = yaml.safe_load(options.prompts.read_text())
    results = run(Suite(options.models, options.texts, prompts), chosen, options.save, options.way)
    show = markdown_table if options.markdown else text_table
    print(machine(options.save.parent))
    for heads, rows in tables({name: results[name] for name in chosen}, list(WAYS)):
        print(show(heads, rows))


if __name__ == "__main__":
    main()
