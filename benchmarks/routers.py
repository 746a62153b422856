"""Every method of making routers, judged by what its mixture predicts: on any base, experts and texts.

    python benchmarks/routers.py MODELS TEXTS --prompts benchmarks/router_prompts.yaml --markdown

MODELS holds `base` and one folder for each expert, TEXTS `EXPERT.calib.txt`, which routers may be fitted to, and
`EXPERT.test.txt`, which judges them; a model that is called otherwise is given by --base and --expert NAME=MODEL. The
mixture is merged once; its routers are replaced in memory. docs/routers.md says what the rows mean.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from table import machine
from transformers import AutoModelForCausalLM

from moemerge import merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.dtypes import ComputeDtype, DType
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import MERGED, ORACLE, SOUP, UNIFORM, estimate, recovered
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.runnable import MixtureModel, Runnable, average, forced, open_dense, open_mixture, uniform
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window, by_transformers, cut_windows
from moemerge.routers.initialisation import Routers, init_routers
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import EncodedPrompt
from moemerge.routers.request import PassOptions
from moemerge.routers.streamed_pass import capture_router_inputs
from moemerge.texts.documents import find_files, read_documents

CPU = Compute(torch.device("cpu"), torch.float32)
# Name of the row, gate_mode, and what it is given: prompts, texts, calibration texts.
ROWS = (
    ("random", "random", ""),
    ("cheap_embed, prompts", "cheap_embed", "prompts"),
    ("mergekit_hidden, prompts", "mergekit_hidden", "prompts"),
    ("hidden, prompts", "hidden", "prompts"),
    ("ridge, prompts", "ridge", "prompts"),
    ("logistic, prompts", "logistic", "prompts"),
    ("delta, weights alone", "delta", ""),
    ("combined, weights alone", "combined", ""),
    ("combined, prompts", "combined", "prompts"),
    ("combined, unsorted texts", "combined", "unsorted"),
    ("combined, texts", "combined", "texts"),
    ("delta_bootstrap, unsorted texts", "delta_bootstrap", "unsorted"),
    ("hidden, texts", "hidden", "texts"),
    ("ridge, texts", "ridge", "texts"),
    ("logistic, texts", "logistic", "texts"),
)
FLIPPED = ("ridge, prompts", "delta, weights alone", "ridge, texts", "logistic, texts")


def as_rows(routers: Routers, experts: int, dtype: DType) -> dict[int, torch.Tensor]:
    """By layer the rows (expert, hidden) of routers as they are stored, in float32."""
    return {
        layer: torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).float().reshape(experts, -1)
        for layer, data in routers.rows.items()
    }


@dataclass
class Bench:
    base: str
    experts: dict[str, str]
    texts: Path
    prompts: dict[str, list[str]]
    per_token: int
    seed: int

    def config(self, mode: str, given: str, **router: object) -> MergeConfig:
        experts = []
        for name, model in self.experts.items():
            expert: dict[str, object] = {"source_model": model}
            if given == "prompts":
                expert["positive_prompts"] = self.prompts[name]
            if given == "texts":
                expert["positive_texts"] = str(self.texts / f"{name}.calib.txt")
            experts.append(expert)
        if given == "unsorted":
            router["calibration_texts"] = [str(self.texts / f"{name}.calib.txt") for name in self.experts]
        document = {
            "base_model": self.base,
            "gate_mode": mode,
            "experts": experts,
            "experts_per_token": self.per_token,
            "dtype": "bfloat16",
            **({"router": router} if router else {}),
        }
        return parse_config(json.dumps(document))

    def rows(
        self, config: MergeConfig, dtype: DType = "bfloat16", compute_dtype: ComputeDtype = "float32"
    ) -> tuple[dict[int, torch.Tensor], float]:
        """By layer the rows (expert, hidden), as a merge stores them, and the seconds that they took."""
        plan = plan_merge(config)
        start = time.perf_counter()
        request = replace(plan.router_request, dtype=dtype)
        options = PassOptions("cpu", compute_dtype)
        routers = init_routers(request, options, seed=self.seed, progress=lambda *_: None)
        seconds = time.perf_counter() - start
        return as_rows(routers, len(self.experts), dtype), seconds

    def line(self, name: str, runs: Runs, tally: RoutingTally | None, *more: str) -> list[str]:
        """Cells of one row: losses, their mean, recovered fraction with its interval, accuracy, top-k, first weight."""
        found = runs.sums[name]
        losses = [estimate(found[domain]).value for domain in runs.texts.domains]
        share = recovered({**runs.sums, MERGED: found}, runs.texts.domains)
        cells = [name, *(f"{loss:.3f}" for loss in losses), f"{np.mean(losses):.3f}"]
        cells.append("-" if share is None else f"{share.value:.2f}{share.interval}")
        if tally:
            routings = [tally.of(place) for place in range(len(runs.texts.domains))]
            cells += [f"{np.mean([getattr(r, key) for r in routings]):.3f}" for key in ("accuracy", "hit_rate")]
            cells.append(f"{np.mean([r.top_weight for r in routings]):.2f}")
        return [*cells, *["-"] * (len(self.experts) + 6 - len(cells)), *more]


def baselines(bench: Bench, mixture: MixtureModel, runs: Runs) -> Iterator[list[str]]:
    """The base, every expert, and mixtures that need no router."""
    dense = {name: open_dense(model, name, print) for name, model in {"base": bench.base, **bench.experts}.items()}
    for name, model in dense.items():
        runs.run(f"{name}, dense", model)
    even = uniform(mixture)
    if isinstance(even, Runnable):
        runs.run(UNIFORM, even)
    for place in range(len(bench.experts)):
        runs.run(ORACLE, forced(mixture, place), domains=[place])
    soup = average(SOUP, [dense[name] for name in bench.experts])
    if not isinstance(soup, str):
        runs.run(SOUP, soup)
    for name in list(runs.sums):
        yield bench.line(name, runs, None)


def table(bench: Bench, mixture: MixtureModel, runs: Runs, methods: list[str]) -> Iterator[list[str]]:
    """Every method of making routers."""
    for name, mode, given in ROWS:
        if (methods and name not in methods) or (given == "prompts" and not bench.prompts):
            continue
        rows, seconds = bench.rows(bench.config(mode, given))
        tally = RoutingTally(mixture, runs.texts)
        replaced = mixture.with_rows(name, rows.__getitem__)
        runs.run(name, replaced.runnable, mixture=replaced, chosen=tally.add)
        yield bench.line(name, runs, tally, f"{seconds:.0f} s")


def flips(bench: Bench, texts: Texts, methods: list[str]) -> Iterator[list[str]]:
    """How often bfloat16, in which states and rows are multiplied, makes another expert the first choice."""
    config = bench.config("random", "")
    plan = plan_merge(config)
    prompts = tuple(EncodedPrompt(0, True, window.ids, window.counted) for window in texts.windows)
    request = PassRequest(plan.parts.base, plan.mixture, plan.family.scoring, prompts, CPU, config.router)
    wanted = [row for row in ROWS if row[0] in FLIPPED and (not methods or row[0] in methods)]
    made = {name: bench.rows(bench.config(mode, given), "float32")[0] for name, mode, given in wanted}
    found: dict[str, list[float]] = {name: [] for name in made}
    for inputs in capture_router_inputs(request) if made else ():
        for name, rows in made.items():
            exact = rows[inputs.layer]
            rounded = (inputs.states.bfloat16() @ exact.bfloat16().T).argmax(dim=1)
            found[name].append(float((rounded != (inputs.states @ exact.T).argmax(dim=1)).float().mean()))
    for name, shares in found.items():
        yield [f"bfloat16 flips the first choice: {name}", f"{np.mean(shares):.2%}"]


def forward_ratio(bench: Bench, repeat: int) -> list[str]:
    """Routers from texts against a plain forward pass of the whole model over the same windows, one after the other."""
    config = bench.config("ridge", "texts")
    encode = by_transformers(plan_merge(config).base_folder)
    windows: list[Window] = []
    for expert in config.experts:
        documents = read_documents(find_files(expert.positive_texts, ""))
        windows += cut_windows(documents, encode, tokens=config.router.tokens_per_expert, length=512, even=True)
    model = AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32)
    ours, plain = [], []
    for _ in range(repeat):
        ours.append(bench.rows(config)[1])
        start = time.perf_counter()
        with torch.inference_mode():
            for window in windows:
                model(torch.tensor([window.ids]), use_cache=False)
        plain.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    tokens = sum(len(window.ids) for window in windows)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {repeat} runs; {median(ours):.0f} s / {median(plain):.0f} s"
    return [f"ridge, texts: time / plain forward pass, {tokens} tokens", f"{median(ratios):.2f} ({spread})"]


def mergekit_distance(bench: Bench, python: str, folder: Path) -> list[str]:
    """How far mergekit_hidden's rows are from mergekit-moe's own."""
    config = bench.config("mergekit_hidden", "prompts")
    document = {
        "base_model": bench.base,
        "experts": [{"source_model": e.source_model, "positive_prompts": e.positive_prompts} for e in config.experts],
    }
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(document))
    program = Path(__file__).with_name("mergekit_gates.py")
    subprocess.run([python, program, folder / "mergekit.yaml", folder / "gates.pt"], check=True)
    theirs = torch.load(folder / "gates.pt")
    rows, _ = bench.rows(config, "float32")
    distance = [
        1 - torch.nn.functional.cosine_similarity(rows[layer], theirs[layer], dim=1) for layer in range(len(theirs))
    ]
    return ["mergekit_hidden: 1 - cosine to mergekit-moe's own gates, largest", f"{torch.stack(distance).max():.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--base", help="the base model, if not MODELS/base")
    parser.add_argument("--expert", action="append", default=[], metavar="NAME=MODEL")
    parser.add_argument("--prompts", type=Path, help="a YAML file: for each expert a list of prompts")
    parser.add_argument("--tokens", type=int, default=8192, help="of test text, for each expert")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", action="append", default=[], help="a row of the table; all without it")
    parser.add_argument("--repeat", type=int, default=0, help="timings of router computation")
    parser.add_argument("--mergekit", help="a Python that has mergekit, to compare mergekit_hidden with")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    experts = dict(given.split("=", 1) for given in options.expert) or {
        path.name: str(path) for path in sorted(options.models.iterdir()) if path.is_dir() and path.name != "base"
    }
    prompts = yaml.safe_load(options.prompts.read_text()) if options.prompts else {}
    bench = Bench(
        options.base or str(options.models / "base"), experts, options.texts, prompts, options.per_token, options.seed
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_merge(bench.config("random", ""))
        merge(plan, folder / "merged")
        mixture = open_mixture(folder / "merged")
        documents = {name: read_documents([options.texts / f"{name}.test.txt"]) for name in experts}
        texts = Texts.cut(mixture, documents, options.tokens, options.window)
        print(machine(folder))
        heads = ["router", *experts, "mean", "recovered", "right first", "right in top k", "first's weight", "time"]
        show(heads, options)
        if options.markdown:
            show(["---"] * len(heads), options)
        runs = Runs(texts, CPU, lambda _name, _done, _total: None)
        rows = (baselines(bench, mixture, runs), table(bench, mixture, runs, options.method))
        for cells in chain(*rows, flips(bench, texts, options.method)):
            show(cells, options)
        if options.repeat:
            show(forward_ratio(bench, options.repeat), options)
        if options.mergekit:
            show(mergekit_distance(bench, options.mergekit, folder), options)


def show(cells: list[str], options: argparse.Namespace) -> None:
    print(f"| {' | '.join(cells)} |" if options.markdown else "  ".join([cells[0].ljust(34), *cells[1:]]), flush=True)


if __name__ == "__main__":
    main()
