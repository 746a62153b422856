"""What `moemerge analyze` prints: a few sentences and a small map of a mixture, and how two differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.console import Console
from rich.text import Text

from moemerge.analysis.advice import advise, describe
from moemerge.analysis.advice_on_weights import BESIDE
from moemerge.analysis.means import mean_of_others, over_roles, series_of
from moemerge.analysis.wording import cosine
from moemerge.cli.tables import Table
from moemerge.evaluation.routes.palette import style_of
from moemerge.printable import printable

if TYPE_CHECKING:
    from moemerge.analysis.figures import Analysis, Numbers

_SENTENCES: Final = 5
_LEVELS: Final = "▁▂▃▄▅▆▇█"
_MOST_ROWS: Final = 24
_MOST_COLUMNS: Final = 64
_NAME: Final = 20
_NEAR: Final = 0.01


def print_analysis(console: Console, analysis: "Analysis", *, begins: bool = True) -> None:
    """Print five sentences on a mixture, what is notable first, one on each FFN beside, and a map of the experts."""
    if not begins:
        console.print()
    console.print(describe(analysis))
    found = advise(analysis)
    beside, advice = ([one for one in found if (one.topic == BESIDE) == is_beside] for is_beside in (True, False))
    for one in (*beside, *advice[: _SENTENCES - 1]):
        console.print(one.sentence)
    if (rest := len(advice) - (_SENTENCES - 1)) > 0:
        console.print(f"({rest} more sentence{'' if rest == 1 else 's'} with --json or --html.)")
    _print_map(console, analysis)


def _print_map(console: Console, analysis: "Analysis") -> None:
    """Print a row for each expert, or for a few neighbours, and a block for each layer, the higher the more."""
    weights, text = analysis.weights, analysis.text
    if text:
        what, values, layers = "Share of tokens that choose each expert", text.frequency.T, text.layers
        low, high = 0.0, float(values.max())
    else:
        similarity = mean_of_others(over_roles(weights.similarity), weights.experts)
        what, values, layers = "Mean cosine of each expert's weights with the others'", similarity.T, weights.layers
        known = values[~np.isnan(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    rows, columns = _parts(len(values), _MOST_ROWS), _parts(len(layers), _MOST_COLUMNS)
    written = "{:.1%}".format if text else cosine
    scale = f"{written(low)} {_LEVELS[0]} to {_LEVELS[-1]} {written(high)}"
    means = " Blocks are means of neighbours." if len(rows) < len(values) or len(columns) < len(layers) else ""
    console.print(f"\n{what}, by layer from {layers[0]} to {layers[-1]}; {scale}.{means}")
    names = [_row_name(weights.names, row) for row in rows]
    width = max(map(len, names))
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        blocks = "".join(_block(values[np.ix_(row, column)], low, high) for column in columns)
        mean = _mean(values[row])
        told = "" if np.isnan(mean) else f"  {written(mean)}"
        told += f", generating {_mean(text.generated.T[row]):.1%}" if text and text.generated is not None else ""
        console.print(Text(f"{name:<{width}}  ").append(blocks, style_of(number)).append(told), soft_wrap=True)


def _parts(count: int, most: int) -> list[list[int]]:
    """Numbers below `count` in as many runs, or as few as `most`."""
    return [part.tolist() for part in np.array_split(np.arange(count), min(count, most))]


def _row_name(names: Sequence[str], row: Sequence[int]) -> str:
    first, last = printable(names[row[0]])[:_NAME], printable(names[row[-1]])[:_NAME]
    return first if len(row) == 1 else f"{first} - {last}"


def _block(values: "Numbers", low: float, high: float) -> str:
    """One block for the mean of some values; a space where there are none, or where all are 0 at a low of 0."""
    mean = _mean(values)
    if np.isnan(mean) or (mean == 0 and low == 0):
        return " "
    part = (mean - low) / (high - low) if high > low else 1.0
    return _LEVELS[min(len(_LEVELS) - 1, int(part * len(_LEVELS)))]


def _mean(values: "Numbers") -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def print_differences(console: Console, one: "Analysis", other: "Analysis") -> None:
    """Print a table of both models' means over the layers that both have, and the layers in which they differ most."""
    console.print(f"\nMeans over the layers that both have, and how much higher {other.model} is than {one.model}:")
    names = [Path(analysis.model).name for analysis in (one, other)]
    table = Table("", *(names if names[0] != names[1] else ("first", "second")), "difference", "lowest", "highest")
    others = {(series.group, series.name): series for series in series_of(other)}
    group = ""
    for series in series_of(one):
        found = others.get((series.group, series.name))
        if not found or not (both := series.shared(found)):
            continue
        if series.group != group:
            group = series.group
            table.add_row(group, *[""] * 5)
        table.add_row(f"  {series.name}", *_compared(both))
    console.print(table)


def _compared(both: Mapping[int, tuple[float, float]]) -> Iterator[str]:
    """Write the means of two models' values by layer, their difference, and the layers in which they differ most."""
    ours, theirs = (sum(values) / len(both) for values in zip(*both.values(), strict=True))
    # What both lack of 1, where that is less than a hundredth.
    written = cosine if all(0 <= 1 - value < _NEAR for value in (ours, theirs)) else "{:.4f}".format
    yield from (written(ours), written(theirs))
    by_layer = {layer: second - first for layer, (first, second) in both.items()}
    if not any(by_layer.values()):
        yield from ("equal", "", "")
        return
    yield f"{theirs - ours:+.2g}"
    for layer in (min(by_layer, key=by_layer.__getitem__), max(by_layer, key=by_layer.__getitem__)):
        yield f"{by_layer[layer]:+.2g} in layer {layer}"
