"""Write analyses as one HTML file; it needs no network and no other file."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moemerge.analysis.advice import advise, describe
from moemerge.analysis.facts import plain
from moemerge.analysis.figures import Analysis, Numbers
from moemerge.analysis.means import series_of
from moemerge.evaluation.page_files import PageTemplate

PAGE: Final = PageTemplate("moemerge.analysis", "analysis")

# Of all models together: a page of 12 MB opens at once, in phones too.
_MOST_CELLS: Final = 8_000_000
_MOST_POINTS: Final = 60_000
_DIGITS: Final = 4
_STEPS: Final = 254
_UNKNOWN: Final = 255


def write_page(path: Path, analyses: Sequence[Analysis]) -> None:
    """Write the page of one analysis, or of two side by side, to `path`, in UTF-8.

    Values of pairs are rounded to 255 steps between the lowest and the highest; what a page has no room for is left
    out, and named on it.

    Raises:
        OutputError: the system refuses to write it.
    """
    PAGE.write(path, {"models": [_model(analysis, len(analyses)) for analysis in analyses]})


def _model(analysis: Analysis, models: int) -> dict[str, Any]:
    weights, text = analysis.weights, analysis.text
    matrices, left_out = _within(_matrices(analysis), _MOST_CELLS // models)
    neurons = weights.neuron_plane
    has_room = neurons.size <= 2 * _MOST_POINTS // models
    return {
        "model": analysis.model,
        "description": describe(analysis),
        "names": weights.names,
        "experts": weights.experts,
        "layers": weights.layers,
        "text_layers": text.layers if text else (),
        "advice": [[advice.topic, advice.sentence, advice.is_notable] for advice in advise(analysis)],
        "series": [[series.group, series.name, plain(series.values)] for series in series_of(analysis)],
        "matrices": matrices,
        "left_out": left_out + ([] if has_room else ["neurons on the plane"]),
        "planes": {role: plain(_to_fit(plane), 3) for role, plane in weights.plane.items()},
        "neurons": neurons.shape[2] if has_room else 0,
        "neuron_planes": _packed(_to_fit(neurons.reshape(*neurons.shape[:1], -1, 2))) if has_room else None,
        "loads": _loads(analysis),
        "columns": {name: plain(values, _DIGITS) for name, values in _columns(analysis)},
    }


def _matrices(analysis: Analysis) -> Iterator[tuple[str, Numbers]]:
    """Yield all matrices by name as cells (layer, pair or cell), what is needed most first."""
    weights, text = analysis.weights, analysis.text
    kinds = {"matched": weights.matched_similarity, "means": weights.mean_similarity, "order": weights.matched_order}
    yield from ((f"whole {role}", _pairs(values)) for role, values in weights.similarity.items())
    yield "router", _pairs(weights.router_similarity)
    if text:
        yield "outputs all", _pairs(text.output_similarity)
        yield "ranks", _shares_of_rows(text.ranks.astype(np.float64))
    for kind, of in kinds.items():
        yield from ((f"{kind} {role}", _pairs(values)) for role, values in of.items())
    if text:
        yield "outputs both", _pairs(text.output_similarity_chosen)
        yield "outputs neither", _pairs(text.output_similarity_others)
        yield "together", _pairs(text.together)


def _within(matrices: Iterator[tuple[str, Numbers]], most: int) -> tuple[dict[str, Any], list[str]]:
    """Pack matrices as long as there is room for their cells, and name the others; those that are not known go."""
    packed: dict[str, Any] = {}
    left_out, used = [], 0
    for name, cells in matrices:
        if used + cells.size > most:
            left_out.append(name)
        elif (made := _packed(cells)) is not None:
            packed[name] = made
            used += cells.size
    return packed, left_out


def _pairs(matrices: Numbers) -> Numbers:
    """Means of both cells of each pair (layer, pair), in the order of those above the diagonal, row after row."""
    rows, columns = np.triu_indices(matrices.shape[1], 1)
    cells: Numbers = (matrices[:, rows, columns] + matrices[:, columns, rows]) / 2
    return cells


def _shares_of_rows(counts: Numbers) -> Numbers:
    """Each row of counts (layer, row, column) as shares of its sum, flat (layer, cell)."""
    sums = counts.sum(axis=2, keepdims=True)
    shares: Numbers = np.where(sums > 0, counts / np.where(sums > 0, sums, 1), np.nan).reshape(len(counts), -1)
    return shares


def _packed(values: Numbers) -> dict[str, Any] | None:
    """Values as bytes from the lowest, 0, to the highest, 254, with 255 for those that are not known; None without any.

    A page decodes them in no time, where numbers in text would be five times as long.
    """
    known = ~np.isnan(values)
    if not known.any():
        return None
    low, high = float(values[known].min()), float(values[known].max())
    steps = np.rint((np.where(known, values, low) - low) * (_STEPS / (high - low) if high > low else 0))
    codes = np.where(known, steps, _UNKNOWN).astype(np.uint8)
    return {"low": plain(low), "high": plain(high), "values": base64.b64encode(codes.tobytes()).decode()}


def _to_fit(points: Numbers) -> Numbers:
    """Points (layer, point, 2), of each layer as far from 0 as 1 at most."""
    known = np.where(np.isnan(points), 0.0, np.abs(points))
    farthest = known.max(axis=(1, 2), keepdims=True, initial=0)
    fitting: Numbers = points / np.where(farthest > 0, farthest, 1)
    return fitting


def _loads(analysis: Analysis) -> list[list[Any]]:
    """Shares of tokens by expert (layer, expert), with names: of all text, of each domain, of what was generated."""
    text = analysis.text
    if text is None:
        return []
    loads = [("all text", text.frequency)]
    loads += zip(text.domains, text.load, strict=True) if len(text.domains) > 1 else ()
    loads += [("generated text", text.generated)] if text.generated is not None else ()
    return [[name, plain(load, 3)] for name, load in loads]


def _columns(analysis: Analysis) -> Iterator[tuple[str, Numbers]]:
    """Yield figures of each expert (layer, expert) that stand in a table."""
    weights, text = analysis.weights, analysis.text
    yield from ((f"norm of {role}", norms) for role, norms in weights.norms.items())
    yield "router row", weights.router_norms
    if text:
        yield "chosen by", text.frequency
        yield "weight there", text.weight
        yield "of all weights times lengths", text.mass_share
        yield "saliency", text.saliency
        yield "output length", text.output_norm
        yield "states near 0", text.sparsity
