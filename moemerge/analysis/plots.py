"""Draw the main figures of analyses as PNG and SVG, for papers; it needs matplotlib."""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from moemerge.analysis.figures import Analysis, Numbers, TextFigures
from moemerge.analysis.means import series_of
from moemerge.checkpoint.copy import write_failure
from moemerge.checkpoint.disk import drafted
from moemerge.errors import RefusedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Names of elements in SVG files are made of it instead of a random number.
_SETTINGS: Final[dict[Any, Any]] = {
    "svg.hashsalt": "moemerge", "svg.fonttype": "none", "font.size": 8.0, "text.parse_math": False,
}  # fmt: skip
_INCHES: Final = 3.4
_DPI: Final = 150
_MOST_LABELS: Final = 16


def check_plots(folder: Path) -> None:
    """Refuse a folder that plots cannot be drawn into: it has to be empty or absent, and matplotlib installed.

    Raises:
        RefusedError: says what is missing, or what is there.
    """
    if find_spec("matplotlib") is None:
        raise RefusedError("--plots: needs matplotlib, which is not installed: pip install 'moemerge[plots]'.")
    if not folder.resolve().parent.is_dir():
        raise RefusedError(f"{folder}: there is no folder to make it in.")
    if os.path.lexists(folder) and not folder.is_dir():
        raise RefusedError(f"{folder}: is no folder. Choose another name.")
    if folder.is_dir() and any(folder.iterdir()):
        raise RefusedError(f"{folder}: is not empty. Choose a folder that is, or a new one.")


def write_plots(folder: Path, analyses: Sequence[Analysis]) -> list[Path]:
    """Draw the figures of one analysis, or of two side by side, each as a PNG and an SVG file.

    The files are the same whenever the figures are, without dates.

    Returns:
        The files.

    Raises:
        OutputError: the system refuses to write one.
    """
    from matplotlib import rc_context

    written = []
    try:
        folder.mkdir(exist_ok=True)
        with rc_context(_SETTINGS):
            for name, figure in _figures(analyses):
                for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                    path = folder / f"{name}.{ending}"
                    with drafted(path) as draft:
                        figure.savefig(draft, dpi=_DPI, metadata=metadata, format=ending)
                    written.append(path)
                    figure.set_layout_engine("none")  # the next file has the same layout, which takes half the time
    except OSError as error:
        raise write_failure(folder, error) from error
    return written


def _figures(analyses: Sequence[Analysis]) -> Iterator[tuple[str, "Figure"]]:
    """Yield figures by the names of their files."""
    yield "layers", _lines(analyses)
    for kind in ("similarity", "matched_similarity"):
        found = [list(getattr(one.weights, kind).items()) for one in analyses]
        if not all(np.isnan(values).all() for row in found for _, values in row):
            yield kind, _matrices(analyses, found)
    rows = [[("router rows", one.weights.router_similarity)] for one in analyses]
    yield "router_similarity", _matrices(analyses, rows)
    yield "plane", _planes(analyses)
    texts = [one.text for one in analyses if one.text]
    if len(texts) == len(analyses):
        outputs = [[("outputs", text.output_similarity)] for text in texts]
        yield "output_similarity", _matrices(analyses, outputs)
        yield "load", _loads(analyses, texts)
        yield "ranks", _ranks(analyses, texts)


def _canvas(rows: int, columns: int) -> tuple["Figure", list[list["Axes"]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES * columns, _INCHES * rows * 0.85), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _title(analysis: Analysis, title: str, analyses: Sequence[Analysis]) -> str:
    return title if len(analyses) == 1 else f"{title}, {Path(analysis.model).name}"


def _lines(analyses: Sequence[Analysis]) -> "Figure":
    """Draw each group of series over the layers; those of a second model are dashed."""
    groups = list(dict.fromkeys(series.group for analysis in analyses for series in series_of(analysis)))
    figure, (places,) = _canvas(1, len(groups))
    for group, axes in zip(groups, places, strict=True):
        for analysis, style in zip(analyses, ("-", "--"), strict=False):
            lines = [series for series in series_of(analysis) if series.group == group and series.values]
            for place, series in enumerate(lines):
                label = _title(analysis, series.name, analyses)
                points = list(series.values), list(series.values.values())
                axes.plot(*points, style, color=f"C{place}", label=label, marker=".", markersize=3)
        axes.set(title=group, xlabel="layer")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.28))  # below the data
    return figure


def _matrices(analyses: Sequence[Analysis], found: Sequence[Sequence[tuple[str, Numbers]]]) -> "Figure":
    """Draw matrices (layer, FFN, FFN), averaged over layers, a row for each model, in the same colours."""
    means = [[(name, _mean_pairs(values)) for name, values in row] for row in found]
    known = np.concatenate([matrix[~np.isnan(matrix)] for row in means for _, matrix in row])
    figure, grid = _canvas(len(means), len(means[0]))
    for analysis, row, places in zip(analyses, means, grid, strict=True):
        for (name, matrix), axes in zip(row, places, strict=True):
            shown = axes.imshow(matrix, cmap="viridis", vmin=known.min(initial=1), vmax=known.max(initial=-1))
            axes.set_title(_title(analysis, f"{name}, mean over layers", analyses), fontsize=8)
            _label(axes, analysis.weights.names[: len(matrix)])
    figure.colorbar(shown, ax=[axes for places in grid for axes in places], label="cosine")
    return figure


def _mean_pairs(matrices: Numbers) -> Numbers:
    """Mean over the layers in which a pair is known, without the diagonal."""
    known = ~np.isnan(matrices)
    count = known.sum(axis=0)
    found: Numbers = np.where(count > 0, np.where(known, matrices, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
    np.fill_diagonal(found, np.nan)
    return found


def _label(axes: "Axes", names: Sequence[str]) -> None:
    """Write names beside rows and below columns, if there is room for them."""
    if len(names) <= _MOST_LABELS:
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_xticks(range(len(names)), names, fontsize=6, rotation=90)


def _planes(analyses: Sequence[Analysis]) -> "Figure":
    """Draw each FFN's gate on two principal components, in the first, middle and last layer, of few layers in each."""
    shown = [sorted({0, (len(one.weights.layers) - 1) // 2, len(one.weights.layers) - 1}) for one in analyses]
    figure, grid = _canvas(len(analyses), max(map(len, shown)))
    for analysis, found, places in zip(analyses, shown, grid, strict=True):
        weights = analysis.weights
        for axes in places[len(found) :]:
            axes.remove()
        for place, axes in zip(found, places, strict=False):
            for expert, (x, y) in enumerate(weights.plane["gate"][place]):
                axes.scatter(x, y, color=f"C{expert % 10}", marker="o" if expert < weights.experts else "s", s=16)
                if len(weights.names) <= _MOST_LABELS:
                    axes.annotate(weights.names[expert], (x, y), (3, 3), textcoords="offset points", fontsize=6)
            axes.set_title(_title(analysis, f"gate, layer {weights.layers[place]}", analyses), fontsize=8)
    return figure


def _loads(analyses: Sequence[Analysis], texts: Sequence[TextFigures]) -> "Figure":
    figure, grid = _canvas(1, len(analyses))
    most = max(text.frequency.max() for text in texts)
    for analysis, text, axes in zip(analyses, texts, grid[0], strict=True):
        shown = axes.imshow(text.frequency.T, cmap="viridis", vmin=0, vmax=most, aspect="auto")
        axes.set(title=_title(analysis, "share of tokens", analyses), xlabel="layer")
        steps = range(0, len(text.layers), max(1, len(text.layers) // 8))
        axes.set_xticks(list(steps), [str(text.layers[step]) for step in steps])
        if len(text.names) <= _MOST_LABELS:
            axes.set_yticks(range(len(text.names)), text.names, fontsize=6)
    figure.colorbar(shown, ax=grid[0])
    return figure


def _ranks(analyses: Sequence[Analysis], texts: Sequence[TextFigures]) -> "Figure":
    figure, grid = _canvas(1, len(analyses))
    for analysis, text, axes in zip(analyses, texts, grid[0], strict=True):
        counts = text.ranks.sum(axis=0).astype(np.float64)
        first, last = 0.5, len(counts) + 0.5
        shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        shown = axes.imshow(shares, cmap="viridis", vmin=0, extent=(first, last, last, first))
        axes.set(title=_title(analysis, "all layers", analyses), xlabel="rank of output length", ylabel="rank of score")
        axes.locator_params(integer=True)
        figure.colorbar(shown, ax=axes, label="share")
    return figure
