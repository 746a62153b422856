"""Whether the FFNs of a model can be experts of a mixture."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from moemerge.checkpoint.derived import read_values
from moemerge.checkpoint.header import TensorInfo
from moemerge.compatibility.distances import STRANGER
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.editing.slots import Added, Foreign, Kept, Slot
from moemerge.errors import IncompatibleError
from moemerge.families.dense import ROLES, DenseModel, ModelTensors
from moemerge.families.expert_view import dense_view
from moemerge.families.family import ROUTER_SCALE
from moemerge.families.stored_mixture import StoredMixture

_ROWS: Final = 4


def misfits(slot: Slot, mixture: StoredMixture) -> Iterator[str]:
    """Yield why an expert cannot be one of a mixture; nothing for the mixture's own."""
    if isinstance(slot, Added):
        yield from _dense_misfits(slot, mixture)
    elif isinstance(slot, Foreign):
        yield from _foreign_misfits(slot, mixture)


def _dense_misfits(slot: Added, mixture: StoredMixture) -> Iterator[str]:
    dense = slot.own.model
    if dense.sizes["hidden"] != mixture.hidden:
        yield f"its hidden_size is {dense.sizes['hidden']}, the mixture's {mixture.hidden}"
        return
    if dense.layers != (layers := mixture.layers):
        yield f"it has {dense.layers} layers, the mixture {layers}"
        return
    if dense.hidden_act != (act := _activation(mixture.config)):
        yield f"its FFN's activation is {dense.hidden_act}, the mixture's {act}"
    sibling = _sibling(mixture)
    # The mixture's norms stay, so that it does not matter what those of the new model add to their weights.
    if sibling and sibling.family.around_ffn != dense.family.around_ffn:
        yield (
            f"a {dense.family.model_type} does not compute like what surrounds the mixture's experts, a "
            f"{sibling.family.model_type}"
        )
    if "mlp_bias" in dense.facts:
        yield "its FFN has biases, which the mixture's experts have not"
    if further := mixture.further_layers:
        yield (
            f"it is a dense model, and the mixture has experts in layer {further[0]} too, which predicts further "
            f"tokens (num_hidden_layers is {mixture.config['num_hidden_layers']}): a dense model has no FFN for it, "
            "and no text enters its router. Experts of such a mixture can be left out and put into another order, and "
            "those of another mixture with the same layers added, as MIXTURE#EXPERT"
        )
        return
    yield from _tensor_misfits(slot.own, mixture)


def _tensor_misfits(own: ModelTensors, mixture: StoredMixture) -> Iterator[str]:
    """Yield the first tensor of FFNs that a dense model lacks, or has in another form."""
    dense, tensors = own.model, own.tensors
    for layer in mixture.moe_layers:
        for name, axes in dense.ffn(layer).items():
            if name not in tensors or tensors[name].shape != dense.shape(axes):
                yield f"it has no tensor {name} of shape {list(dense.shape(axes))}"
                return
            if tensors[name].dtype not in CONFIG_DTYPES:
                yield f"{name} is stored as {tensors[name].dtype}; expected one of {', '.join(CONFIG_DTYPES.values())}"
                return


def _foreign_misfits(slot: Foreign, mixture: StoredMixture) -> Iterator[str]:
    other = slot.other
    if other.hidden != mixture.hidden:
        yield f"its mixture's hidden_size is {other.hidden}, this one's {mixture.hidden}"
        return
    if other.layers != mixture.layers:
        yield f"its mixture has {other.layers} layers, this one {mixture.layers}"
        return
    ours, theirs = _activation(mixture.config), _activation(other.config)
    if ours != theirs:
        yield f"its mixture's activation is {theirs}, this one's {ours}"
    if missing := sorted({*mixture.moe_layers} - {*other.moe_layers}):
        yield f"its mixture has no experts in layer {missing[0]}, where this one has some"
        return
    how, their = mixture.choosing, other.choosing
    if (how.scoring, how.normalises) != (their.scoring, their.normalises):
        yield "its mixture weighs experts in another way, so what they weigh there says nothing here"
    dtype = other.projection(other.moe_layers[0], 0, "down").dtype
    if dtype not in CONFIG_DTYPES:
        yield f"its mixture's experts are stored as {dtype}; expected one of {', '.join(CONFIG_DTYPES.values())}"
    yield from _numbers_lost(slot, mixture)


def _numbers_lost(slot: Foreign, mixture: StoredMixture) -> Iterator[str]:
    """Yield what another mixture's experts compute with and this one has no place for."""
    other = slot.other
    for layer in mixture.moe_layers:
        if slot.number in other.switched_off(layer):
            yield f"it is switched off in layer {layer} of its mixture, which has no FFN of it there"
            return
        theirs, ours = other.by_expert(layer), mixture.by_expert(layer)
        factors = other.family.weight_factors
        if factors in theirs and factors not in ours:
            yield f"its mixture multiplies what it adds by {factors}, which this one does not have"
            return
        scales = [of.layer(layer).get(ROUTER_SCALE) for of in (other, mixture)]
        if not _equal(*scales):
            yield f"its mixture's {ROUTER_SCALE} differs in layer {layer}, so its router row would say something else"
            return


def _equal(one: TensorInfo | None, other: TensorInfo | None) -> bool:
    return one is other or (
        one is not None and other is not None and np.array_equal(read_values(one), read_values(other))
    )


def strangers(slots: Sequence[Slot], mixture: StoredMixture) -> Iterator[str]:
    """Yield new experts that are no fine-tunes of what the mixture's own are, by some of their rows, as warnings.

    Raises:
        CheckpointError: a file cannot be read.
        SourceError: a file on the Hub cannot be reached.
    """
    for slot in slots:
        if isinstance(slot, Kept) or slot.width(mixture) != mixture.expert_width:
            continue
        distance = _distance(slot, mixture)
        if distance > STRANGER:
            yield (
                f"{slot.place}: its FFNs differ from the mixture's by {distance:.0%}; fine-tunes of one model differ "
                "by a few percent, and experts that were trained apart rarely work together"
            )


def _distance(slot: Slot, mixture: StoredMixture) -> float:
    """`|new - old| / |old|` over some rows of an expert and of the mixture's first, in the middle layer."""
    layer = mixture.moe_layers[len(mixture.moe_layers) // 2]
    squares = np.zeros(2)
    for role in ROLES:
        ours, theirs = mixture.projection(layer, 0, role), slot.projection(mixture, layer, role)
        if ours.dtype not in CONFIG_DTYPES:  # quantised
            return 0.0
        old, new = (read_values(tensor.rows(0, _ROWS)) for tensor in (ours, theirs))
        old = old[:, : new.shape[1]]  # in some layers a dense model's FFN may be narrower
        squares += np.square(new - old).sum(), np.square(old).sum()
    return float((squares[0] / squares[1]) ** 0.5) if squares[1] else 0.0


def _sibling(mixture: StoredMixture) -> DenseModel | None:
    """The dense model that computes what one of a mixture's experts does; None where there is none."""
    try:
        return dense_view(mixture, 0).model
    except IncompatibleError:
        return None


def _activation(config: Mapping[str, Any]) -> str:
    return str(config.get("hidden_act") or config.get("hidden_activation") or "silu")
