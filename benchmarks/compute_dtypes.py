"""What passes on a CPU take in float32 and in bfloat16, beside whole models in transformers, and what changes.

    OMP_NUM_THREADS=1 python benchmarks/compute_dtypes.py MODELS TEXTS

MODELS and TEXTS are as for `routers.py`. Routers are those of `ridge` from 4096 tokens of each expert; the mixture
reads test text, as in `moemerge eval` and `moemerge routes`. Both dtypes take turns, and the least processor time of
`--repeat` rounds counts, so that other programs disturb little.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from expert_sets import ExpertSet
from table import machine
from transformers import AutoModelForCausalLM

from moemerge import merge, plan_merge
from moemerge.dtypes import ComputeDtype
from moemerge.evaluation.choices import Choice
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import MixtureModel, open_mixture
from moemerge.evaluation.running import run_model
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window, by_transformers, cut_windows
from moemerge.texts.documents import find_files, read_documents

DTYPES: tuple[ComputeDtype, ...] = ("float32", "bfloat16")


class Rounds:
    """The least processor time of each program in each dtype, and what it last gave."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}
        self.found: dict[tuple[str, str], Any] = {}

    def run(self, what: str, program: Callable[[ComputeDtype], Any]) -> None:
        for dtype in DTYPES:
            start = time.process_time()
            self.found[what, dtype] = program(dtype)
            seconds = time.process_time() - start
            self.seconds[what, dtype] = min(seconds, self.seconds.get((what, dtype), seconds))

    def lines(self) -> Iterator[str]:
        for what in dict.fromkeys(what for what, _ in self.seconds):
            single, half = (self.seconds[what, dtype] for dtype in DTYPES)
            yield f"{what:36} {single:6.1f} s {half:6.1f} s  {half / single:.2f}"


def whole(folder: str | Path, windows: list[Window], kept: int, dtype: str) -> None:
    """Loads a whole model, and runs it over windows; `kept` is the number of logits, 0 for all with their loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window.ids])
            logits = model(ids, use_cache=False, logits_to_keep=kept).logits[0].float()
            if not kept:
                torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])


def read(mixture: MixtureModel, windows: list[Window], losses: bool, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (window,) of the mixture, and its first choices (choice of a layer for a token,)."""
    first: dict[tuple[int, int], torch.Tensor] = {}

    def chosen(choice: Choice) -> None:
        first[choice.layer, choice.window] = choice.experts[:, 0]

    compute = Compute(torch.device("cpu"), getattr(torch, dtype))
    found = run_model(mixture.runnable, windows, compute, mixture=mixture, chosen=chosen, losses=losses)
    return found, torch.cat([first[place] for place in sorted(first)])


def changes(rounds: Rounds, other: MixtureModel, windows: list[Window]) -> Iterator[str]:
    """What is otherwise in bfloat16: the rows, and what a mixture chooses and predicts; `other` has rows of it."""
    single, half = (rounds.found["ridge", dtype] for dtype in DTYPES)
    distances = torch.tensor([float((half[layer] - row).norm() / row.norm()) for layer, row in single.items()])
    yield f"rows: relative distance {distances.mean():.4f}, in one layer at most {distances.max():.4f}"
    scored = torch.tensor([sum(window.scored) for window in windows])
    exact, rounded = (rounds.found["eval", dtype] for dtype in DTYPES)
    with_rows = read(other, windows, True, DTYPES[0])
    for what, found in (("eval in bfloat16", rounded), ("eval in float32 of rows made in bfloat16", with_rows)):
        flips = float((found[1] != exact[1]).float().mean())
        mean, (largest, middle) = (found[0] - exact[0]).sum() / scored.sum(), _largest(found[0] - exact[0], scored)
        yield (
            f"{what}: other first choices {flips:.2%}, mean loss {exact[0].sum() / scored.sum():.4f} {mean:+.4f} nats "
            f"per token, of one window {middle:.4f} (median), at most {largest:.4f}"
        )


def _largest(difference: torch.Tensor, scored: torch.Tensor) -> tuple[float, float]:
    apart = (difference / scored).abs()
    return float(apart.max()), float(apart.median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of test text, for each expert")
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    models = {path.name: str(path) for path in sorted(options.models.iterdir()) if path.name != "base"}
    given = {name: str(options.texts / f"{name}.calib.txt") for name in models}
    experts = ExpertSet(str(options.models / "base"), models, given, {})
    config = experts.config("ridge", "texts")
    encode, fitted = by_transformers(plan_merge(config).base_folder), []
    for expert in config.experts:
        documents = read_documents(find_files(expert.positive_texts, ""))
        fitted += cut_windows(documents, encode, tokens=config.router.tokens_per_expert, length=512, even=True)
    rounds = Rounds()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "merged"
        merge(plan_merge(experts.config("random", "")), out)
        mixture = open_mixture(out)
        tests = {name: read_documents([options.texts / f"{name}.test.txt"]) for name in models}
        windows = list(Texts.cut(mixture, tests, options.tokens, 512).windows)
        print(machine(out))
        print(f"{sum(len(w.ids) for w in fitted)} tokens of texts, {sum(len(w.ids) for w in windows)} of test text")
        for _ in range(options.repeat):
            rounds.run("ridge", lambda dtype: experts.rows(config, compute_dtype=dtype)[0])
            single, half = (mixture.with_rows(dtype, rounds.found["ridge", dtype].__getitem__) for dtype in DTYPES)
            rounds.run("whole base, the same texts", partial(whole, experts.base, fitted, 1))
            rounds.run("eval", partial(read, single, windows, True))
            rounds.run("routes", partial(read, single, windows, False))
            rounds.run("whole mixture, the same test text", partial(whole, out, windows, 0))
            print("\n".join(rounds.lines()), flush=True)
        for line in changes(rounds, half, windows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
