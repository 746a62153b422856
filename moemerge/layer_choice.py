"""Which layers a config means: `all`, `second-half`, a layer, a range such as `8-` or `8-15`, or a list."""

import re
from typing import Any

LayerChoice = str | list[int]


def read_layers(value: Any) -> LayerChoice:
    """Check how layers are written; whether a model has them is not known yet.

    Raises:
        ValueError: not in one of the ways.
    """
    if type(value) is int and value >= 0:
        return str(value)
    if isinstance(value, str) and re.fullmatch(r"all|second-half|\d+|\d+-\d*|-\d+", value):
        return value
    if isinstance(value, list) and value and all(type(layer) is int and layer >= 0 for layer in value):
        return value
    raise ValueError("expected all, second-half, a layer such as 8, a range such as 8- or 8-15, or a list of layers")


def chosen_layers(layers: LayerChoice, count: int) -> tuple[int, ...] | str:
    """The layers that `layers` names of a model with `count`, in ascending order; a text says what is wrong."""
    if isinstance(layers, list):
        chosen = sorted(set(layers))
    elif layers == "all":
        chosen = list(range(count))
    elif layers == "second-half":
        chosen = list(range(count // 2, count))
    else:
        first, dash, last = layers.partition("-")
        end = int(last or count - 1) if dash else int(first)
        chosen = list(range(int(first or 0), end + 1))
    if not chosen or chosen[-1] >= count:
        return f"names layers that the model does not have: it has 0 to {count - 1}"
    return tuple(chosen)
