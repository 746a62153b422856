"""What `moemerge search` prints: the recipes that were tried, and how the chosen one does on held-out text."""

from typing import TYPE_CHECKING

from rich.console import Console

from moemerge.checkpoint.disk import shown_bytes
from moemerge.cli.tables import Table
from moemerge.evaluation.figures import FEWEST_DOCUMENTS

if TYPE_CHECKING:
    from moemerge.searching.results import SearchResult, Trial


def print_search(console: Console, found: "SearchResult") -> None:
    """Print the trials from the best to the worst, those that no other beats, and losses on held-out text."""
    _print_trials(console, found)
    if found.cost:
        what = "size" if found.cost == "bytes" else "active parameters"
        console.print(f"No other recipe beats these in loss and {what}, of those that saw all text:")
        table = Table("trial", "loss", "worst", "size", "active")
        for number in found.front:
            table.add_row(str(number), *_figures(found.trials[number]))
        console.print(table)
    _print_held_out(console, found)


def _print_trials(console: Console, found: "SearchResult") -> None:
    console.print(
        f"Loss in nats per token in {found.dtype}; * is the chosen one; ~ was stopped early, and is shown as far from "
        "the chosen one as on the text that both read. worst: the most above a text's dense model."
    )
    places = list(dict.fromkeys(place for trial in found.trials for place in trial.values))
    table = Table("trial", "loss", "worst", "size", "active", "tokens", *places)
    best = {n: place for place, n in enumerate((found.chosen, *found.front))}
    ranked = sorted(
        found.trials,
        key=lambda trial: (best.get(trial.number, len(best)), not trial.complete, trial.loss or 0.0, trial.number),
    )
    for trial in sorted(ranked, key=lambda trial: bool(trial.failure)):
        number = f"{trial.number}{'*' if trial.number == found.chosen else ''}"
        table.add_row(
            number, *_figures(trial), f"{trial.tokens:,}", *(trial.values.get(place, "-") for place in places)
        )
    console.print(table)
    for trial in found.trials:
        if trial.failure:
            console.print(f"trial {trial.number} could not be tried: {trial.failure}")


def _figures(trial: "Trial") -> list[str]:
    if trial.loss is None or trial.worst is None:
        return ["-"] * 4
    mark = "" if trial.complete else "~"
    active = f"{trial.active_parameters / 1e6:,.1f}M"
    return [f"{mark}{trial.loss:.4f}", f"{trial.worst:+.4f}", shown_bytes(trial.weight_bytes), active]


def _print_held_out(console: Console, found: "SearchResult") -> None:
    held = found.held_out
    few = [name for name, count in held.documents.items() if count < FEWEST_DOCUMENTS]
    intervals = "" if len(few) == len(held.documents) else ", with 95 % intervals over documents"
    console.print(f"On held-out text, which the search did not see{intervals}:")
    table = Table("", *held.losses, "mean of all")
    table.add_row(
        f"trial {found.chosen}",
        *(f"{loss.value:.3f}{loss.interval}" for loss in held.losses.values()),
        f"{held.mean:.3f}",
    )
    mean = sum(held.dense.values()) / len(held.dense)
    table.add_row("dense model", *(f"{loss:.3f}" for loss in held.dense.values()), f"{mean:.3f}")
    console.print(table)
    named = ", ".join(f"{name}: {model}" for name, model in found.dense.items())
    console.print(f"Mean loss above that of the dense models ({named}): {held.against_dense.precise}")
    if held.against_first:
        console.print(f"Mean loss above that of trial 0, the first options: {held.against_first.precise}")
        if held.against_first.value > 0:
            console.print("So the first options do better on text that the search did not see.")
    counts = ", ".join(f"{name}: {count}" for name, count in held.documents.items())
    console.print(f"Held-out documents: {counts}")
    if few:
        console.print(
            f"Too few to be sure of {', '.join(few)}: intervals need {FEWEST_DOCUMENTS} documents. --max-tokens reads "
            "more, if there are more, and --test names more."
        )
