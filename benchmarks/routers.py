"""Every method of making routers, judged by what its mixture predicts: on any base, experts and texts.

    python benchmarks/routers.py MODELS TEXTS --prompts benchmarks/router_prompts.yaml --markdown

MODELS holds `base` and one folder for each expert, TEXTS `EXPERT.calib.txt`, which routers may be fitted to, and
`EXPERT.test.txt`, which judges them; a model that is called otherwise is given by --base and --expert NAME=MODEL. The
mixture is merged once; its routers are replaced in memory. docs/routers.md says what the rows mean.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from expert_sets import ExpertSet, run_baseline
from table import machine
from transformers import AutoModelForCausalLM

from moemerge import merge, plan_merge
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.figures import MERGED, ORACLE, SOUP, UNIFORM, estimate, recovered
from moemerge.evaluation.model_runs import RoutingTally, Runs
from moemerge.evaluation.runnable import MixtureModel, open_dense, open_mixture
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window, by_transformers, cut_windows
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import EncodedPrompt
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


def line(name: str, runs: Runs, tally: RoutingTally | None, *more: str) -> list[str]:
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
    return [*cells, *["-"] * (len(losses) + 6 - len(cells)), *more]


def baselines(experts: ExpertSet, mixture: MixtureModel, runs: Runs) -> Iterator[list[str]]:
    """The base, every expert, and mixtures that need no router."""
    models = {"base": experts.base, **experts.models}
    dense = {name: open_dense(model, name, print) for name, model in models.items()}
    for name, model in dense.items():
        runs.run(f"{name}, dense", model)
    for name in (UNIFORM, ORACLE, SOUP):
        run_baseline(name, runs, mixture, [dense[expert] for expert in experts.models])
    for name in list(runs.sums):
        yield line(name, runs, None)


def table(experts: ExpertSet, mixture: MixtureModel, runs: Runs, methods: list[str]) -> Iterator[list[str]]:
    """Every method of making routers."""
    for name, mode, given in ROWS:
        if (methods and name not in methods) or (given == "prompts" and not experts.prompts):
            continue
        rows, seconds = experts.rows(experts.config(mode, given))
        tally = RoutingTally(mixture, runs.texts)
        replaced = mixture.with_rows(name, rows.__getitem__)
        runs.run(name, replaced.runnable, mixture=replaced, tally=tally)
        yield line(name, runs, tally, f"{seconds:.0f} s")


def flips(experts: ExpertSet, texts: Texts, methods: list[str]) -> Iterator[list[str]]:
    """How often bfloat16, in which states and rows are multiplied, makes another expert the first choice."""
    config = experts.config("random", "")
    plan = plan_merge(config)
    prompts = tuple(EncodedPrompt(0, True, window.ids, window.counted) for window in texts.windows)
    request = PassRequest(plan.parts.base, plan.mixture, plan.family.scoring, prompts, CPU, config.router)
    wanted = [row for row in ROWS if row[0] in FLIPPED and (not methods or row[0] in methods)]
    made = {name: experts.rows(experts.config(mode, given), "float32")[0] for name, mode, given in wanted}
    found: dict[str, list[float]] = {name: [] for name in made}
    for inputs in capture_router_inputs(request) if made else ():
        for name, rows in made.items():
            exact = rows[inputs.layer]
            rounded = (inputs.states.bfloat16() @ exact.bfloat16().T).argmax(dim=1)
            found[name].append(float((rounded != (inputs.states @ exact.T).argmax(dim=1)).float().mean()))
    for name, shares in found.items():
        yield [f"bfloat16 flips the first choice: {name}", f"{np.mean(shares):.2%}"]


def forward_ratio(experts: ExpertSet, repeat: int) -> list[str]:
    """Routers from texts against a plain forward pass of the whole model over the same windows, one after the other."""
    config = experts.config("ridge", "texts")
    encode = by_transformers(plan_merge(config).base_folder)
    windows: list[Window] = []
    for expert in config.experts:
        documents = read_documents(find_files(expert.positive_texts, ""))
        windows += cut_windows(documents, encode, tokens=config.router.tokens_per_expert, length=512, even=True)
    model = AutoModelForCausalLM.from_pretrained(experts.base, dtype=torch.float32)
    ours, plain = [], []
    for _ in range(repeat):
        ours.append(experts.rows(config)[1])
        start = time.perf_counter()
        with torch.inference_mode():
            for window in windows:
                model(torch.tensor([window.ids]), use_cache=False)
        plain.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    tokens = sum(len(window.ids) for window in windows)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {repeat} runs; {median(ours):.0f} s / {median(plain):.0f} s"
    return [f"ridge, texts: time / plain forward pass, {tokens} tokens", f"{median(ratios):.2f} ({spread})"]


def mergekit_distance(experts: ExpertSet, python: str, folder: Path) -> list[str]:
    """How far mergekit_hidden's rows are from mergekit-moe's own."""
    config = experts.config("mergekit_hidden", "prompts")
    document = {
        "base_model": experts.base,
        "experts": [{"source_model": e.source_model, "positive_prompts": e.positive_prompts} for e in config.experts],
    }
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(document))
    program = Path(__file__).with_name("mergekit_gates.py")
    subprocess.run([python, program, folder / "mergekit.yaml", folder / "gates.pt"], check=True)
    theirs = torch.load(folder / "gates.pt")
    rows, _ = experts.rows(config, "float32")
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
    models = dict(given.split("=", 1) for given in options.expert) or {
        path.name: str(path) for path in sorted(options.models.iterdir()) if path.is_dir() and path.name != "base"
    }
    prompts = yaml.safe_load(options.prompts.read_text()) if options.prompts else {}
    files = {name: str(options.texts / f"{name}.calib.txt") for name in models}
    base = options.base or str(options.models / "base")
    experts = ExpertSet(base, models, files, prompts, options.per_token, seed=options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_merge(experts.config("random", ""))
        merge(plan, folder / "merged")
        mixture = open_mixture(folder / "merged")
        documents = {name: read_documents([options.texts / f"{name}.test.txt"]) for name in models}
        texts = Texts.cut(mixture, documents, options.tokens, options.window)
        print(machine(folder))
        heads = ["router", *models, "mean", "recovered", "right first", "right in top k", "first's weight", "time"]
        show(heads, options)
        if options.markdown:
            show(["---"] * len(heads), options)
        runs = Runs(texts, CPU, lambda _name, _done, _total: None)
        rows = (baselines(experts, mixture, runs), table(experts, mixture, runs, options.method))
        for cells in chain(*rows, flips(experts, texts, options.method)):
            show(cells, options)
        if options.repeat:
            show(forward_ratio(experts, options.repeat), options)
        if options.mergekit:
            show(mergekit_distance(experts, options.mergekit, folder), options)


def show(cells: list[str], options: argparse.Namespace) -> None:
    print(f"| {' | '.join(cells)} |" if options.markdown else "  ".join([cells[0].ljust(34), *cells[1:]]), flush=True)


if __name__ == "__main__":
    main()
