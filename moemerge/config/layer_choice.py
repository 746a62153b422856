"""Read the layers that a config names: `all`, `second-half`, a layer, a range such as `8-` or `8-15`, or a list."""

import re
from typing import Any, Final

NAMED_LAYERS: Final = ("all", "second-half")
WRITTEN_LAYERS: Final = r"\d{1,5}|\d{1,5}-(\d{1,5})?"
"""A pattern of a layer, or of a range of layers."""
LayerChoice = str | list[int]


def read_layers(value: Any) -> LayerChoice:
    """Check how layers are written; a model's number of layers is not needed for it.

    Raises:
        ValueError: the layers are written in no known way.
    """
    if type(value) is int and value >= 0:
        return [value]
    if isinstance(value, str) and (value in NAMED_LAYERS or re.fullmatch(WRITTEN_LAYERS, value)):
        return value
    if isinstance(value, list) and value and all(type(layer) is int and layer >= 0 for layer in value):
        return value
    raise ValueError("expected all, second-half, a layer such as 8, a range such as 8- or 8-15, or a list of layers")


def chosen_layers(layers: LayerChoice, count: int) -> tuple[int, ...] | str:
    """The layers that `layers` names in a model with `count` layers, in ascending order; or a text with the problem."""
    if isinstance(layers, list):
        first, last, chosen = min(layers), max(layers), sorted(set(layers))
    elif layers in NAMED_LAYERS:
        first, last = 0 if layers == "all" else count // 2, count - 1
    else:
        start, dash, end = layers.partition("-")
        first, last = int(start), int(end or count - 1) if dash else int(start)
    if first > last and not (isinstance(layers, str) and layers.endswith("-")):
        return f"{layers!r} ends before it begins"
    if max(first, last) >= count:
        return f"{layers!r} names layers that the model does not have: it has 0 to {count - 1}"
    return tuple(chosen) if isinstance(layers, list) else tuple(range(first, last + 1))
