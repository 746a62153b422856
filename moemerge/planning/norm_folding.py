"""Fold an expert's norm into the first projections of its FFN, so that the FFN can follow the shared norm.

The FFN was trained on `gamma_e * x / |x|`, and in the mixture gets `gamma * x / |x|`. With the columns of its gate and
up projections multiplied by `gamma_e / gamma` it computes what it did before: exactly, wherever `gamma` is not zero.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np

from moemerge.checkpoint.derived import Derived, Rows, ScaledColumns, read_values
from moemerge.checkpoint.finite import first_not_finite
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.jobs import CONNECTIONS
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.families.dense import ModelTensors
from moemerge.families.layer_names import layer_prefix

# A larger factor leaves too few digits in the product. Even models of 100 M parameters have norms with
# a weight of a thousandth of the others; with the same in the shared norm that does no harm.
_LARGEST_FACTOR: Final = 1e4


def fold_norms(name: str, expert: ModelTensors, base: ModelTensors, layers: Sequence[int]) -> dict[str, TensorInfo]:
    """Return an expert's tensors, with norms that differ from the shared ones folded into gate and up projections.

    This reads the norms: one vector for each layer.

    Args:
        name: the expert's name, for messages.
        expert: the model whose FFNs are taken.
        base: the base model, with the tensors that the merged model has beside its experts.
        layers: the layers whose FFNs are taken.

    Raises:
        CheckpointError: a norm holds numbers that are infinite or NaN.
        IncompatibleError: the FFNs are not behind a norm of their own, or a shared norm has weights near zero.
    """
    folded: dict[str, TensorInfo] = {}
    problems: list[str] = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:  # on the Hub each norm is a request
        behind = list(pool.map(partial(_differs_behind, expert, base), layers))
        ratios = list(pool.map(partial(_ratio, expert, base), layers))
    if found := next(filter(None, behind), None):
        problems.append(
            f"fold_norms: {name}: {found}, the norm after its FFN, is not the shared one's, and cannot be folded into "
            "an FFN. Leave out fold_norms"
        )
    for layer, (ratio, lost) in zip(layers, ratios, strict=True):
        if lost:
            problems.append(
                f"fold_norms: {name}: {lost} of {len(ratio)} weights of layer {layer}'s shared norm are near zero "
                "beside its own: the expert needs what that norm removes. Leave out fold_norms"
            )
        elif (ratio != 1).any():
            folded |= dict(_fold(expert, layer, ratio))
    if problems:
        raise IncompatibleError("These models cannot be merged:", problems)
    return {**expert.tensors, **folded}


def _ratio(expert: ModelTensors, base: ModelTensors, layer: int) -> tuple[Rows, int]:
    """Compute the factors (hidden,) on the columns, and count those that are too large to use."""
    model = expert.model
    if not (model.family.ffn_norm and base.model.family.ffn_norm):
        raise IncompatibleError(
            "These models cannot be merged:",
            [f"fold_norms: in a {model.family.model_type} no norm comes before the FFN, so there is none to fold"],
        )
    own, given = (
        read_values(one.tensors[f"{layer_prefix(layer)}{one.model.family.ffn_norm}"])
        + np.float32(one.model.family.norm_offset)
        for one in (expert, base)
    )
    for one, norm in ((expert, own), (base, given)):
        if not np.isfinite(norm).all():
            tensor = one.tensors[f"{layer_prefix(layer)}{model.family.ffn_norm}"]
            raise CheckpointError(f"{first_not_finite([tensor])}, so no norm can be folded. Download that file again.")
    changed = own != given
    lost = changed & (np.abs(own) > _LARGEST_FACTOR * np.abs(given))
    ratio = np.ones_like(own)
    np.divide(own, given, out=ratio, where=changed & ~lost)
    return ratio, int(lost.sum())


def _differs_behind(expert: ModelTensors, base: ModelTensors, layer: int) -> str | None:
    """Name the expert's norm between FFN and residual stream if it differs from the shared one; None otherwise."""
    name = layer_prefix(layer) + "post_feedforward_layernorm.weight"
    ours, theirs = base.tensors, expert.tensors
    differs = name in theirs and not np.array_equal(read_values(theirs[name]), read_values(ours[name]))
    return name if differs else None


def _fold(expert: ModelTensors, layer: int, ratio: Rows) -> Iterator[tuple[str, TensorInfo]]:
    recipe_key = hashlib.sha256(ratio.tobytes()).hexdigest()
    for name in {expert.model.family.ffn[role].name for role in ("gate", "up")}:
        tensor = expert.tensors[layer_prefix(layer) + name]
        recipe = ScaledColumns(ratio)
        yield tensor.name, Derived("norms folded into", (tensor,), recipe, recipe_key, "F32").tensor(tensor.name)
