"""The dense model that one expert of a mixture is, with all that the mixture's experts share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moemerge.checkpoint.derived import Derived, Rows, read_values
from moemerge.checkpoint.disk import shown_bytes
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.joined import joined
from moemerge.checkpoint.regrouped import Heads, Regrouped
from moemerge.errors import IncompatibleError
from moemerge.families.dense import ROLES, DenseModel, Role
from moemerge.families.dense_sibling import dense_sibling
from moemerge.families.family import ROUTER_SCALE, Extra, Names, separate
from moemerge.families.layer_names import ROTATED, in_layer, layer_prefix
from moemerge.families.stored_mixture import StoredMixture

Chosen = int | Literal["shared"]
"""An expert's number, or its shared expert."""
Ffn = Mapping[Role, TensorInfo]
"""The projections of an FFN: (width, hidden), and (hidden, width) for `down`."""


@dataclass(frozen=True)
class DenseView:
    """A dense model whose tensors are those of a mixture; nothing is copied."""

    config: dict[str, Any]
    """Its `config.json`."""
    tensors: dict[str, TensorInfo]
    """Its tensors by name, in the order of the layers."""
    model: DenseModel
    notes: tuple[str, ...] = ()
    """Notes on what of the mixture is not in it."""


def dense_view(mixture: StoredMixture, expert: Chosen) -> DenseView:
    """Make the dense model that computes what the mixture would with one expert in place of all.

    Attention, norms, embeddings and the FFNs of dense layers are the mixture's, every other FFN is the expert's. A
    factor on what experts add (`routed_scaling_factor`) multiplies its `down` projections. Tensors that only the
    mixture needs are left out, if they do nothing; their values are read.

    Raises:
        IncompatibleError: no dense family computes the same; lists every reason.
        CheckpointError: a file is damaged.
    """
    name = "the shared expert" if expert == "shared" else f"expert {expert}"
    layers = routed_layers(mixture)
    if expert != "shared":
        return dense_with(
            mixture, {layer: expert_ffn(mixture, layer, expert) for layer in layers}, name, _left_out(mixture, name)
        )
    ffns = {layer: shared_ffn(mixture, layer) for layer in layers}
    if not all(ffns.values()):
        raise _refusal(name, ["it has no shared expert"])
    return dense_with(mixture, {layer: ffn for layer, ffn in ffns.items() if ffn}, name)


def routed_layers(mixture: StoredMixture) -> list[int]:
    """Numbers of the layers with experts, without those that predict further tokens."""
    return [layer for layer in mixture.moe_layers if layer < mixture.layers]


def dense_with(mixture: StoredMixture, ffns: Mapping[int, Ffn], name: str, notes: Sequence[str] = ()) -> DenseView:
    """Make the dense model that has the given FFNs in a mixture's MoE layers.

    Args:
        mixture: the mixture.
        ffns: the FFN of each MoE layer.
        name: what messages call the FFNs.
        notes: notes on what of the mixture is not in them.

    Raises:
        IncompatibleError: see `dense_view`.
        CheckpointError: see `dense_view`.
    """
    every = {layer: ffns[layer] if layer in ffns else _dense_ffn(mixture, layer) for layer in range(mixture.layers)}
    widths = {layer: ffn["down"].shape[-1] for layer, ffn in every.items() if ffn}
    width = next((widths[layer] for layer in ffns), 0)
    if odd := [f"layer {layer} is dense, with {found} neurons" for layer, found in widths.items() if found != width]:
        raise _refusal(name, [f"{odd[0]}; the FFNs of the other layers would have {width}"])
    idle = _idle_extras(mixture)

    def holds(tensor: str) -> bool:
        return tensor in mixture.tensors or any(
            tensor in mixture.layer(layer) and tensor not in idle for layer in every
        )

    def misfits(model: DenseModel) -> list[str]:
        return [*_misfits(mixture, model, idle)]

    try:
        config, model = dense_sibling(mixture.family, mixture.config, width, holds, misfits)
        return DenseView(
            config, _tensors(mixture, model, every), model, (*_further(mixture), *_outside(mixture, model), *notes)
        )
    except ValueError as error:
        raise _refusal(name, [str(reason) for reason in error.args]) from None


def _refusal(name: str, problems: list[str]) -> IncompatibleError:
    return IncompatibleError(f"There is no dense model that computes like {name} of this mixture:", problems)


def expert_ffn(mixture: StoredMixture, layer: int, expert: int) -> Ffn:
    """The FFN of one expert in a layer, with the factor that the mixture multiplies it by.

    Raises:
        IncompatibleError: there is no such expert, or the layer never chooses it.
        CheckpointError: the selection bias cannot be read.
    """
    name = f"expert {expert}"
    if not 0 <= expert < mixture.experts:
        raise _refusal(name, [f"it has experts 0 to {mixture.experts - 1}"])
    if expert in mixture.switched_off(layer):
        raise _refusal(name, [f"it is switched off in layer {layer}, which has no FFN of it"])
    ffn = {role: mixture.projection(layer, expert, role) for role in ROLES}
    return ffn | {"down": scaled(ffn["down"], mixture.choosing.scale)}


def shared_ffn(mixture: StoredMixture, layer: int) -> Ffn | None:
    """The FFN of a layer's shared expert, with what the mixture multiplies it by; None where it has none, or zeros.

    Raises:
        IncompatibleError: the mixture weighs it anew for each token, or averages it with the others.
        CheckpointError: its values cannot be read.
    """
    found = mixture.shared_ffn(layer)
    if found is None or _is_zero(found["down"]):
        return None
    return found | {"down": scaled(found["down"], _shared_factor(mixture, layer))}


def _shared_factor(mixture: StoredMixture, layer: int) -> float:
    """What a shared expert's output is multiplied by."""
    shared = mixture.family.shared
    if mixture.config.get("shared_expert_combination_strategy", "sum") != "sum":
        raise _refusal("the shared expert", ["it is averaged with the others, and not added to them"])
    if shared is None or not shared.gate:
        return 1.0
    if not _is_zero(mixture.layer(layer)[shared.gate]):
        raise _refusal("the shared expert", [f"its gate ({shared.gate}) weighs it anew for each token"])
    return 0.5  # the sigmoid of 0


def scaled(tensor: TensorInfo, factor: float) -> TensorInfo:
    """A matrix multiplied by a number while it is read."""
    if factor == 1.0:
        return tensor

    def recipe(_row: int, blocks: list[Rows]) -> Rows:
        return blocks[0] * np.float32(factor)

    return Derived("scaled from", (tensor,), recipe, f"times {factor!r}", tensor.dtype).tensor(tensor.name)


def _is_zero(tensor: TensorInfo) -> bool:
    return not read_values(tensor).any()


def _dense_ffn(mixture: StoredMixture, layer: int) -> Ffn:
    """The FFN of a layer without experts; empty where it has none."""
    names: Names = mixture.family.dense_ffn or separate("mlp")
    held = mixture.layer(layer)
    return {roles[0]: held[name] for name, roles in names.items() if name in held}


def _idle_extras(mixture: StoredMixture) -> frozenset[str]:
    """Tensors that the family has and a dense model need not have, where they do nothing in any layer."""

    def does_nothing(extra: Extra, held: Mapping[str, TensorInfo]) -> bool:
        if extra.name not in held or extra.name == ROUTER_SCALE:
            return True
        values = read_values(held[extra.name])
        if not extra.source:
            # -1e4 is rounded where it is stored as bfloat16
            return bool(np.allclose(values, extra.value, rtol=2**-8, atol=0))
        return extra.source in held and bool(np.array_equal(values, read_values(held[extra.source])))

    layers = [mixture.layer(layer) for layer in range(mixture.layers)]
    return frozenset(extra.name for extra in mixture.family.extras if all(does_nothing(extra, held) for held in layers))


def _misfits(mixture: StoredMixture, model: DenseModel, idle: frozenset[str]) -> Iterator[str]:
    """Name tensors that the dense model needs and the mixture lacks, and those that it has beside them."""
    for name, axes in model.outside().items():
        found = mixture.tensors.get(name)
        if found is None or found.shape != model.shape(axes):
            yield f"expected tensor {name} of shape {list(model.shape(axes))}, found {_shape(found)}"
    for layer in range(model.layers):
        held, prefix = mixture.layer(layer), layer_prefix(layer)
        needed = dict(_parts(model, layer))
        for name, shape in needed.items():
            found = held.get(name)
            if found is None or found.shape != shape:
                yield f"expected tensor {prefix}{name} of shape {list(shape)}, found {_shape(found)}"
        ours = _of_mixture(mixture, layer)
        beside = [
            name
            for name in held.keys() - needed.keys() - ours - idle
            if not mixture.is_expert(prefix + name) and not (prefix + name).endswith(model.family.derived)
        ]
        if beside:
            more = f" and {len(beside) - 1} more" if beside[1:] else ""
            yield f"it has no place for tensor {prefix}{min(beside)}{more}"
            return


def _shape(tensor: TensorInfo | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))


def _parts(model: DenseModel, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a dense layer's tensors beside its FFN, as a mixture stores them: split where it splits."""
    for name, axes in model.tensors(layer).items():
        inner, shape = name.removeprefix(layer_prefix(layer)), model.shape(axes)
        parts = model.family.splits.get(inner)
        if parts is None:
            yield inner, shape
        for part, axis in (parts or {}).items():
            yield part, (model.sizes[axis], *shape[1:])


def _of_mixture(mixture: StoredMixture, layer: int) -> set[str]:
    """Names of a layer's tensors that make up its FFNs: experts, router, shared expert, or the dense FFN."""
    family = mixture.family
    dense = set(family.dense_ffn or separate("mlp"))
    if layer not in mixture.moe_layers:
        return dense
    shared = {*family.shared.names, family.shared.gate} if family.shared else set()
    return {family.router, family.selection_bias, *shared, *(dense if family.keeps_dense_ffn else ())}


def _tensors(mixture: StoredMixture, model: DenseModel, ffns: Mapping[int, Ffn]) -> dict[str, TensorInfo]:
    """The dense model's tensors by name, under its own names."""
    found = {name: mixture.tensors[name] for name in model.first}
    turns = model.family.interleaved and not mixture.family.interleaved
    heads = Heads(model.sizes["head"], model.rotated_rows, into_pairs=True)
    for layer in range(model.layers):
        held, prefix = mixture.layer(layer), layer_prefix(layer)
        for name in model.tensors(layer):
            parts = model.family.splits.get(name.removeprefix(prefix))
            found[name] = joined(name, [held[part] for part in parts]) if parts else held[name.removeprefix(prefix)]
            if turns and ROTATED.search(name):
                found[name] = Regrouped(found[name], heads).tensor()
        found |= {name: joined(name, parts) for name, parts in _stored_ffn(model, prefix, ffns[layer]).items()}
    found[model.family.last] = mixture.tensors[model.family.last]
    if model.family.head in mixture.tensors:
        found[model.family.head] = mixture.tensors[model.family.head]
    return {name: replace(tensor, name=name) for name, tensor in found.items()}


def _stored_ffn(model: DenseModel, prefix: str, ffn: Ffn) -> dict[str, list[TensorInfo]]:
    """The tensors of an FFN by name, each with the projections that it holds."""
    named: dict[str, list[TensorInfo]] = {}
    for role, projection in sorted(model.family.ffn.items(), key=lambda item: item[1].part):
        named.setdefault(prefix + projection.name, []).append(ffn[role])
    return named


def _further(mixture: StoredMixture) -> Iterator[str]:
    """Name layers that a dense model does not have."""
    further = max(mixture.moe_layers) - mixture.layers + 1
    if further > 0:
        yield f"{further} layers that predict further tokens are left out"


def _outside(mixture: StoredMixture, model: DenseModel) -> Iterator[str]:
    """Say which tensors outside the layers a dense model does not have."""
    has = {*model.outside(), model.family.head}
    beside = [name for name in mixture.tensors if in_layer(name) is None and name not in has]
    lost = [name for name in beside if not name.endswith(model.family.derived)]
    if lost:
        nbytes = shown_bytes(sum(mixture.tensors[name].nbytes for name in lost))
        yield (
            f"{len(lost)} tensors outside the layers are left out, {nbytes}, which the dense model's class does not "
            f"read: {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}"
        )


def _left_out(mixture: StoredMixture, name: str) -> list[str]:
    """Say that an expert alone lacks the shared one."""
    shared = mixture.shared_projection(mixture.moe_layers[0], "down")
    there = shared is not None and not _is_zero(shared)
    return [f"the mixture adds a shared expert to {name}, which is left out"] if there else []
