"""An analysis as values of JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moemerge.analysis.advice import advise
from moemerge.analysis.figures import Analysis, Numbers, TextFigures, WeightFigures
from moemerge.analysis.means import mean, series_of

_AXES: Final = {"layers", "names", "experts", "domains"}
_DIGITS: Final = 9
# Of figures of pairs, and of what they lack of 1.
_DIGITS_OF_PAIRS: Final = 4
_PAIRS: Final = {
    "similarity", "mean_similarity", "matched_similarity", "matched_order", "router_similarity", "output_similarity",
    "output_similarity_chosen", "output_similarity_others", "together",
}  # fmt: skip
_EXACT: Final = 22  # the largest power of ten that is a float


def analysis_facts(analysis: Analysis) -> dict[str, Any]:
    """Give every figure of an analysis by its name, and the advice; figures are arrays, for `json_text`.

    Figures are in the order of their section's `layers`, of `experts` followed by `beside`, and of `domains`; what each
    is stands in `moemerge.analysis.figures`. Numbers have nine digits; those of pairs of experts have four, and four of
    what they lack of 1, which tell fine-tunes of one base apart.
    """
    weights, text = analysis.weights, analysis.text
    return {
        "model": analysis.model,
        "model_type": analysis.model_type,
        "experts_per_token": analysis.experts_per_token,
        "experts": list(weights.names[: weights.experts]),
        "beside": list(weights.names[weights.experts :]),
        "weights": {"layers": list(weights.layers), **_figures(weights)},
        "text": text and {"layers": list(text.layers), "domains": list(text.domains), **_figures(text)},
        "advice": [asdict(advice) for advice in advise(analysis)],
    }


def difference_facts(one: Analysis, other: Analysis) -> list[dict[str, Any]]:
    """Give what both analyses found of the layers that both have: means, and how much higher the second's values are.

    Differences are by the number of the layer.
    """
    others = {(series.group, series.name): series for series in series_of(other)}
    return [
        {
            "group": series.group,
            "name": series.name,
            "means": plain([mean(np.array(values, np.float64)) for values in zip(*both.values(), strict=True)]),
            "differences": {str(layer): plain(second - first) for layer, (first, second) in both.items()},
        }
        for series in series_of(one)
        if (found := others.get((series.group, series.name))) and (both := series.shared(found))
    ]


def plain(value: Any, digits: int = _DIGITS) -> Any:
    """Make lists and numbers of arrays, with so many digits; None stands for what is not known or not finite."""
    if isinstance(value, Mapping):
        return {key: plain(one, digits) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return _listed(_rounded(value, np.abs(value), digits) if value.dtype.kind == "f" else value)
    if isinstance(value, list | tuple):
        return [plain(one, digits) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if np.isfinite(value) else None
    return value


def _listed(values: NDArray[Any]) -> Any:
    if (unknown := ~np.isfinite(values)).any():
        values = values.astype(object)
        values[unknown] = None
    return values.tolist()


def _rounded(values: Numbers, sizes: Numbers, digits: int) -> Numbers:
    """Round numbers so that as many digits of `sizes` are left, to the floats that are written shortest."""
    known = np.isfinite(values) & (sizes > 0)
    places = digits - 1 - np.floor(np.log10(np.where(known, sizes, 1)))
    power = 10.0 ** np.minimum(np.abs(places), _EXACT)
    large = np.rint(np.where(known, values, 0) / power) * power
    rounded = np.where(known, np.where(places < 0, large, np.rint(np.where(known, values, 0) * power) / power), values)
    for tiny in zip(*np.nonzero(known & (np.abs(places) > _EXACT)), strict=True):
        rounded[tiny] = float(f"{values[tiny]:.{digits}g}")
    return rounded


def json_text(facts: Any) -> str:
    """Write facts as JSON: a key on each line, and of an array a row on each; null stands for what is not known."""
    # The one control character that JSON leaves as it is.
    return "".join(_written(facts, "")).replace("\x7f", "\\u007f")


def _written(value: Any, indent: str) -> Iterator[str]:
    deeper = f"{indent}  "
    if isinstance(value, np.ndarray):
        yield _compact(_listed(value)).replace("],", "],\n")
    elif isinstance(value, Mapping) and value:
        for place, (key, one) in enumerate(value.items()):
            yield f"{',' if place else '{'}\n{deeper}{json.dumps(key)}: "
            yield from _written(one, deeper)
        yield f"\n{indent}}}"
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for place, one in enumerate(value):
            yield f"{',' if place else '['}\n{deeper}"
            yield from _written(one, deeper)
        yield f"\n{indent}]"
    else:
        yield _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _figures(found: WeightFigures | TextFigures) -> dict[str, Any]:
    named = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in _AXES}
    return {name: _short(value, is_of_pairs=name in _PAIRS) for name, value in named.items()}


def _short(value: Any, *, is_of_pairs: bool) -> Any:
    """Round arrays to as many digits as say something, and make lists of tuples."""
    if isinstance(value, Mapping):
        return {key: _short(one, is_of_pairs=is_of_pairs) for key, one in value.items()}
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value if isinstance(value, np.ndarray) else plain(value)
    size: Numbers = np.abs(value)
    if is_of_pairs:  # what is exactly 1 is written so with any number of digits
        return _rounded(value, np.where(size == 1, size, np.minimum(size, np.abs(1 - size))), _DIGITS_OF_PAIRS)
    return _rounded(value, size, _DIGITS)
