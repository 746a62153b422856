"""What "A Closer Look into Mixture-of-Experts in Large Language Models" found, measured on other mixtures.

    python benchmarks/paper_findings.py MIXTURE ... --data NAME=FILE ... --tokens 1024 --markdown

The paper is https://arxiv.org/abs/2406.18219; docs/analysis.md says what each row means. Every mixture has a column and
reads the same text, in float32. A mixture whose neurons are too many to match has `-` there.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from table import machine, markdown_table, text_table

from moemerge.analysis.components import correlation
from moemerge.analysis.figures import Numbers, TextFigures, WeightFigures
from moemerge.analysis.text import analyze_text
from moemerge.analysis.weights import analyze_weights
from moemerge.evaluation.domain_texts import Texts
from moemerge.evaluation.runnable import open_mixture
from moemerge.families.dense import Role
from moemerge.passes.compute_dtype import Compute
from moemerge.texts.documents import read_documents

ROLES: tuple[Role, ...] = ("up", "gate", "down")
EXCHANGES = 1000
Cells = Iterator[tuple[str, str]]


def pairs(matrices: Numbers) -> Numbers:
    """Figures of all pairs of different experts (layer, pair) of those of FFNs (layer, FFN, FFN)."""
    above = np.triu_indices(matrices.shape[1], 1)
    return np.array([matrix[above] for matrix in matrices])


def by_depth(values: Numbers) -> str:
    """Means over the thirds of all layers but the last, and the last layer; the rank correlation with depth."""
    before = values[:-1]
    thirds = " ".join(f"{np.nanmean(third):.3g}" for third in np.array_split(before, 3))
    order = np.arange(len(before), dtype=np.float64)
    rank = correlation(order, before.argsort().argsort().astype(np.float64))
    return f"{thirds}; {values[-1]:.3g} ({rank:+.2f})"


def correlations(one: Numbers, other: Numbers) -> Numbers:
    """Pearson's correlation (layer,) of figures of the same pairs (layer, pair)."""
    one, other = (values - values.mean(axis=1, keepdims=True) for values in (one, other))
    found: Numbers = (one * other).sum(axis=1) / np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return found


def association(routers: Numbers, experts: Numbers) -> str:
    """The mean R2 of two similarities (layer, expert, expert), layers with R > 0, and R2 of routers in another order.

    Their rows change places at random, in all layers alike: the mean, and how often R2 is as large as without.
    """
    found = correlations(pairs(routers), pairs(experts))
    mean, choice = float((found**2).mean()), np.random.default_rng(0)
    orders = [choice.permutation(experts.shape[1]) for _ in range(EXCHANGES)]
    exchanged = [
        float((correlations(pairs(routers[:, order][:, :, order]), pairs(experts)) ** 2).mean()) for order in orders
    ]
    as_large = sum(one >= mean * (1 - 1e-9) for one in exchanged) / EXCHANGES
    return f"{mean:.3f}, {(found > 0).sum()} of {len(found)} ({np.mean(exchanged):.3f}, {as_large:.1%})"


def neurons(found: WeightFigures) -> Cells:
    """The first finding: neurons act like fine-grained experts."""
    count = found.experts
    for what, matrices in (("means over neurons", found.mean_similarity), ("whole matrices", found.similarity)):
        for role in ROLES:
            experts = matrices[role][:, :count, :count]
            yield f"router rows with {role}, {what}: R2", association(found.router_similarity, experts)
    for what, matrices in (("cosine", found.matched_similarity), ("Kendall's tau", found.matched_order)):
        matched = [pairs(matrices[role][:, :count, :count]) for role in ROLES]
        shown = " ".join(f"{np.nanmean(one):.3f}" for one in matched) if found.matched_neurons else "-"
        yield f"matched neurons, {', '.join(ROLES)}: {what}", shown


def norms(found: TextFigures) -> Cells:
    """The second finding: the router usually selects experts with larger output norms."""
    count, rows = len(found.names), found.ranks.sum(axis=0)
    yield (
        "first expert has the longest output: mean, least, most of layers",
        f"{_range(found.largest_first)} (chance {1 / count:.3f})",
    )
    yield "score with output's length: R", _range(found.norm_correlation)
    same = int((rows.argmax(axis=1) == np.arange(count)).sum())
    yield "score ranks whose commonest length rank is the same", f"{same} of {count}"
    yield "mean length of outputs", by_depth(found.output_norm.mean(axis=1))
    yield "intermediate states near 0", by_depth(found.sparsity.mean(axis=1))


def _range(values: Numbers) -> str:
    return f"{values.mean():.3f}, {values.min():.3f}, {values.max():.3f}"


def diversity(weights: WeightFigures, text: TextFigures) -> Cells:
    """The third finding: diversity grows with depth, and the last layer is an outlier."""
    count = weights.experts
    for role in ROLES:
        yield f"1 - cosine of {role}", by_depth(1 - pairs(weights.similarity[role][:, :count, :count]).mean(axis=1))
    means = pairs(weights.mean_similarity["gate"][:, :count, :count])
    yield "1 - cosine of gate, means over neurons", by_depth(1 - means.mean(axis=1))
    yield "1 - cosine of router rows", by_depth(1 - pairs(weights.router_similarity).mean(axis=1))
    for what, matrices in (
        ("outputs", text.output_similarity),
        ("outputs, both chosen", text.output_similarity_chosen),
        ("outputs, neither chosen", text.output_similarity_others),
    ):
        yield f"1 - cosine of {what}", by_depth(1 - np.nanmean(pairs(matrices), axis=1))
    outputs, whole = pairs(text.output_similarity), pairs(weights.similarity["up"][:, :count, :count])
    yield "outputs' with up's similarity: R, mean of layers", f"{correlations(outputs, whole).mean():.3f}"


def measure(folder: Path, data: dict[str, list[Path]], options: argparse.Namespace) -> dict[str, str]:
    mixture = open_mixture(folder)
    texts = Texts.cut(
        mixture,
        {name: [one for file in files for one in read_documents([file])] for name, files in data.items()},
        options.tokens,
        options.window,
    )
    weights = analyze_weights(mixture.as_stored)
    text = analyze_text(mixture, texts, Compute(torch.device("cpu"), torch.float32))
    return {
        "experts, per token, layers": f"{weights.experts}, {mixture.experts_per_token}, {len(weights.layers)}",
        "tokens": str(sum(text.tokens)),
        **dict(neurons(weights)),
        **dict(norms(text)),
        **dict(diversity(weights, text)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixtures", nargs="+", type=Path)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE", help="text that none has seen")
    parser.add_argument("--tokens", type=int, default=1024, help="of each name")
    parser.add_argument("--window", type=int, default=200, help="in tokens")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    data: dict[str, list[Path]] = {}
    for given in options.data:
        name, _, file = given.partition("=")
        data.setdefault(name, []).append(Path(file))
    columns = [measure(folder, data, options) for folder in options.mixtures]
    print(machine(Path.cwd()))
    headings = ["", *(folder.name for folder in options.mixtures)]
    show: Callable[..., str] = markdown_table if options.markdown else text_table
    print(show(headings, [[row, *(column[row] for column in columns)] for row in columns[0]]))


if __name__ == "__main__":
    main()
