"""Names that all families give their tensors."""

import re
from typing import Final

_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")

ROTATED: Final = re.compile(r"\.[qk]_proj\.")
"""Found in the names of the projections whose rows rotate with positions."""


def layer_prefix(layer: int) -> str:
    """The prefix of a decoder layer's tensors in a checkpoint, such as `model.layers.7.`."""
    return f"model.layers.{layer}."


def in_layer(name: str) -> tuple[int, str] | None:
    """A tensor's layer and its name within the layer; None for one outside of all layers."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else None
