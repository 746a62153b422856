"""What `shared_weights: auto` chooses, beside the losses of every method on other text of the same kinds.

    python benchmarks/shared_choice.py CONFIG ... --markdown

Each CONFIG is a merge of experts with positive_texts that have `calib` in their names: by these the choice is made. The
same names with `test` in its place lead to the text that judges it. Losses are means over the experts, in nats per
token: each expert's text in a dense model of the method's shared weights and that expert's FFNs.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from routers import show

from moemerge import load_config, plan_merge
from moemerge.evaluation.shared_weights import best_of, losses_of
from moemerge.passes.compute_dtype import find_compute
from moemerge.passes.tokens import by_transformers, cut_windows
from moemerge.planning.shared_choice import BASE, MIXED, TOKENS, with_method
from moemerge.texts.documents import find_files, read_documents

METHODS = (BASE, *MIXED)


def planned(path: Path) -> Any:
    """Plan every method, whether or not `auto` would choose among them for these models."""
    plan = plan_merge(with_method(load_config(path), BASE))
    return replace(plan, candidates={BASE: plan, **{m: plan.remake(with_method(plan.config, m)) for m in MIXED}})


def losses(plan: Any, kind: str, tokens: int, length: int) -> Any:
    encode = by_transformers(plan.base_folder)
    texts = [
        read_documents(find_files([text.replace("calib", kind) for text in expert.positive_texts], "positive_texts"))
        for expert in plan.config.experts
    ]
    windows = [cut_windows(documents, encode, tokens=tokens, length=length) for documents in texts]
    compute = find_compute("cpu", "auto", plan.parts.base.layer_shapes)
    return losses_of(plan, windows, compute, lambda *_: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each expert's text, to choose and to judge by")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    heads = ["experts", *METHODS, "chosen", *(f"{method}, other text" for method in METHODS), "above the best"]
    show(heads, options)
    if options.markdown:
        show(["---"] * len(heads), options)
    for path in options.configs:
        plan = planned(path)
        choice = best_of(losses(plan, "calib", options.tokens, 256))
        judged = best_of(losses(plan, "test", options.tokens, 512)).losses
        above = judged[choice.method] - min(judged.values())
        cells = [[f"{found[method]:.4f}" for method in METHODS] for found in (choice.losses, judged)]
        show([path.stem, *cells[0], choice.method, *cells[1], f"{above:.4f}"], options)


if __name__ == "__main__":
    main()
