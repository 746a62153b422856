"""The chosen recipe as a plain merge config, with comments that say what it was chosen by."""

from pathlib import Path
from typing import Final

from moemerge.config.config_copy import text_for
from moemerge.searching.results import SearchResult

_OBJECTIVES: Final = {"mean": "the mean loss", "worst": "the loss above the dense models' on the worst text"}


def chosen_text(found: SearchResult, folder: Path) -> str:
    """Write the chosen config for a file in `folder`, from which relative paths count."""
    trial, held = found.trials[found.chosen], found.held_out
    tried = sum(not one.failure for one in found.trials)
    recipe, losses = Path(found.recipe).name, [f"{name} {loss.precise}" for name, loss in held.losses.items()]
    lines = [
        f"Chosen by `moemerge search` from {tried} merges of {recipe}, by {_OBJECTIVES[found.objective]}",
        f"(trial {found.chosen}, seed {found.seed}). Losses in nats per token, in {found.dtype}:",
        f"on the text that it was chosen by, in the mean: {trial.loss:.4f}",
        f"on held-out text, in the mean: {held.mean:.4f}; {', '.join(losses)}",
        f"above that of each text's dense model, held out: {held.against_dense.precise}",
    ]
    if held.against_first:
        lines.append(f"above that of the recipe's first options, held out: {held.against_first.precise}")
    comments = "".join(f"# {line}\n" for line in lines)
    return f"{comments}\n{text_for(found.config, folder)}"
