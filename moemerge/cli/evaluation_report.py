"""What `moemerge eval` prints: a sentence, losses beside baselines, and what the routers do."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table as Grid

from moemerge.cli.tables import Table
from moemerge.evaluation.figures import MERGED
from moemerge.evaluation.verdict import WORDS, best_models, verdict

if TYPE_CHECKING:
    from moemerge.evaluation.figures import Estimate, Evaluation

_LARGEST_LOSS: Final = math.log(1e6)


def print_evaluation(console: Console, found: "Evaluation", *, by_layer: bool, explain: bool) -> None:
    """Print a verdict, losses by model and domain, what choosing experts recovers, and the routers' choices."""
    console.print(f"{verdict(found)}.")
    _print_losses(console, found)
    if found.differences:
        gaps = [f"{model} {gap.value:+.3f}{gap.interval}" for model, gap in found.differences.items()]
        console.print(f"Mean loss of {MERGED} above that of others, on the same documents: {', '.join(gaps)}")
    if found.recovered_mean:
        mean = found.recovered_mean
        parts = [f"{name} {part.value:.2f}" for name, part in found.recovered.items()]
        console.print(
            "Recovered of what choosing the right expert gains over mixing all alike: "
            f"{mean.value:.2f}{mean.interval} in the mean; {', '.join(parts)}"
        )
    _print_routing(console, found)
    if by_layer:
        for name, routing in found.routing.items():
            console.print(f"Load by layer, {name}:")
            table = Table("layer", *found.experts)
            for layer, loads_of in zip(found.layers, routing.load_by_layer, strict=True):
                table.add_row(str(layer), *(f"{share:.0%}" for share in loads_of))
            console.print(table)
    if explain:
        words = Grid.grid(padding=(0, 2))
        for word, meaning in WORDS.items():
            words.add_row(word, meaning)
        console.print(words)


def print_differences(
    console: Console, found: Sequence["Evaluation"], differences: "Sequence[Estimate | None]"
) -> None:
    """Print how each model after the first does against the first, on the same documents."""
    first = found[0]
    for other, difference in zip(found[1:], differences, strict=True):
        if difference is None:
            console.print(f"{other.model} reads other tokens than {first.model}, so their losses do not compare.")
            continue
        lower = [
            domain.name
            for domain in first.domains
            if other.losses[MERGED][domain.name].value < first.losses[MERGED][domain.name].value
        ]
        console.print(
            f"{other.model} against {first.model}: {difference.value:+.4f}{difference.interval} nats per token, lower "
            f"on {', '.join(lower) or 'no text'}."
        )


def _print_losses(console: Console, found: "Evaluation") -> None:
    console.print(f"Loss in nats per token (perplexity) in {found.dtype}; * is the lowest, label oracle aside:")
    table = Table("", *(domain.name for domain in found.domains), "mean of all")
    best = best_models(found)

    def cell(model: str, column: str, value: float | None) -> str:
        return "-" if value is None else f"{_loss(value)}{'*' if best[column] == model else ''}"

    for model, losses in found.losses.items():
        values = {domain.name: losses[domain.name].value if domain.name in losses else None for domain in found.domains}
        cells = [cell(model, column, value) for column, value in values.items()]
        table.add_row(model, *cells, cell(model, "", found.mean_losses.get(model)))
    console.print(table)
    read = [f"{d.name}: {d.tokens:,} tokens, from {d.documents} of {d.available} documents" for d in found.domains]
    console.print(f"Text that was read: {'; '.join(read)}")


def _print_routing(console: Console, found: "Evaluation") -> None:
    console.print("Routing, averaged over layers (--explain says what the words mean):")
    table = Table(
        "",
        "right first",
        f"right in {found.experts_per_token}",
        *(f"to {name}" for name in found.experts),
        "entropy",
        "first's weight",
    )
    for name, routing in found.routing.items():
        right = ["-" if share is None else f"{share:.1%}" for share in (routing.accuracy, routing.hit_rate)]
        loads = [f"{share:.1%}" for share in routing.load]
        table.add_row(name, *right, *loads, f"{routing.entropy:.2f}", f"{routing.top_weight:.2f}")
    console.print(table)


def _loss(value: float) -> str:
    """Format a loss with its perplexity, which is cut at 1e6: a model that predicts nothing has a page of digits."""
    perplexity = f"{math.exp(value):.2f}" if value < _LARGEST_LOSS else "over 1e6"
    return f"{value:.3f} ({perplexity})"
