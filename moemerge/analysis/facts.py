"""An analysis as values of JSON."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final

import numpy as np

from moemerge.analysis.advice import advise
from moemerge.analysis.figures import Analysis, TextFigures, WeightFigures
from moemerge.analysis.means import series_of

_AXES: Final = {"layers", "names", "experts", "domains"}


def analysis_facts(analysis: Analysis) -> dict[str, Any]:
    """Give every figure of an analysis by its name, and the advice.

    Figures are arrays in the order of their section's `layers`, of `experts` followed by `beside`, and of `domains`;
    what each is stands in `moemerge.analysis.figures`. Numbers have nine digits, which tell fine-tunes of one base
    apart, and null stands for one that is not known.
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
    """Give what both analyses found of each layer: means over layers, and how much higher the second one's values are.

    Differences are by the number of the layer, of layers that both have.
    """
    others = {(series.group, series.name): series for series in series_of(other)}
    return [
        {
            "group": series.group,
            "name": series.name,
            "means": plain([series.mean, found.mean]),
            "differences": {
                str(layer): plain(found.values[layer] - value)
                for layer, value in series.values.items()
                if layer in found.values
            },
        }
        for series in series_of(one)
        if (found := others.get((series.group, series.name)))
    ]


def plain(value: Any, digits: int = 9) -> Any:
    """Make lists and numbers of arrays, with so many digits; None stands for NaN."""
    if isinstance(value, Mapping):
        return {key: plain(one, digits) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), digits)
    if isinstance(value, list | tuple):
        return [plain(one, digits) for one in value]
    if isinstance(value, float):
        return None if np.isnan(value) else float(f"{value:.{digits}g}")
    return value


def _figures(found: WeightFigures | TextFigures) -> dict[str, Any]:
    return {field.name: plain(getattr(found, field.name)) for field in fields(found) if field.name not in _AXES}
