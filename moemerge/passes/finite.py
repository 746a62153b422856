"""Find where the numbers of a pass stop being finite: in a weight, or in what finite weights make of the text."""

import math

import torch

from moemerge.checkpoint.finite import NotFinite


def all_finite(values: torch.Tensor) -> bool:
    """Whether all numbers are finite, by their smallest and largest, which take a tenth of the time of `isfinite`."""
    return not values.numel() or bool((values.min() > -math.inf) & (values.max() < math.inf))


def not_finite_in(name: str, values: torch.Tensor) -> NotFinite | None:
    """Count the infinite and NaN numbers of a tensor and find the first; None where all are finite."""
    if all_finite(values):
        return None
    found = ~values.isfinite()
    count, place, first = int(found.sum()), int(found.flatten().byte().argmax()), []
    for size in reversed(values.shape):
        place, index = divmod(place, size)
        first.append(index)
    return NotFinite(name, "", count, tuple(reversed(first)))


def where_it_began(place: str, broken: NotFinite | None, dtype: torch.dtype) -> str:
    """Explain why the output of a part of a model is not finite although its input was: `numbers are not ...`.

    Args:
        place: the part, in words: `layer 3`.
        broken: a weight of the part that is not finite, if there is one.
        dtype: the dtype that is computed in.
    """
    if broken:
        return f"numbers are not finite from {place} on: {broken}"
    largest = f"{torch.finfo(dtype).max:.2g}, the largest that {str(dtype).removeprefix('torch.')} holds"
    return f"numbers overflow in {place}, whose weights are finite: they grow beyond {largest}"
