"""Whether the FFNs of a model can be experts of a mixture."""

from collections.abc import Iterator, Mapping
from typing import Any

from moemerge.dtypes import CONFIG_DTYPES
from moemerge.editing.slots import Added, Foreign, Slot
from moemerge.families.stored_mixture import StoredMixture


def misfits(slot: Slot, mixture: StoredMixture) -> Iterator[str]:
    """Yield why an expert cannot be one of a mixture; nothing for the mixture's own."""
    if isinstance(slot, Added):
        yield from _dense_misfits(slot, mixture)
    elif isinstance(slot, Foreign):
        yield from _foreign_misfits(slot.other, mixture)


def _dense_misfits(slot: Added, mixture: StoredMixture) -> Iterator[str]:
    dense, tensors = slot.own.model, slot.own.tensors
    if dense.sizes["hidden"] != mixture.hidden:
        yield f"its hidden_size is {dense.sizes['hidden']}, the mixture's {mixture.hidden}"
        return
    if dense.hidden_act != (act := _activation(mixture.config)):
        yield f"its FFN's activation is {dense.hidden_act}, the mixture's {act}"
    if "mlp_bias" in dense.facts:
        yield "its FFN has biases, which the mixture's experts have not"
    if missing := [layer for layer in mixture.moe_layers if layer >= dense.layers]:
        yield f"it has {dense.layers} layers, and the mixture has experts in layer {missing[0]}"
        return
    for layer in mixture.moe_layers:
        for name, axes in dense.ffn(layer).items():
            if name not in tensors or tensors[name].shape != dense.shape(axes):
                yield f"it has no tensor {name} of shape {list(dense.shape(axes))}"
                return
            if tensors[name].dtype not in CONFIG_DTYPES:
                yield f"{name} is stored as {tensors[name].dtype}; expected one of {', '.join(CONFIG_DTYPES.values())}"
                return


def _foreign_misfits(other: StoredMixture, mixture: StoredMixture) -> Iterator[str]:
    if other.hidden != mixture.hidden:
        yield f"its mixture's hidden_size is {other.hidden}, this one's {mixture.hidden}"
        return
    ours, theirs = _activation(mixture.config), _activation(other.config)
    if ours != theirs:
        yield f"its mixture's activation is {theirs}, this one's {ours}"
    if missing := sorted({*mixture.moe_layers} - {*other.moe_layers}):
        yield f"its mixture has no experts in layer {missing[0]}, where this one has some"
        return
    dtype = other.projection(other.moe_layers[0], 0, "down").dtype
    if dtype not in CONFIG_DTYPES:
        yield f"its mixture's experts are stored as {dtype}; expected one of {', '.join(CONFIG_DTYPES.values())}"


def _activation(config: Mapping[str, Any]) -> str:
    return str(config.get("hidden_act") or config.get("hidden_activation") or "silu")
