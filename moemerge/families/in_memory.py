"""Checkpoints with transformers 5's own names and shapes of experts, read in the layout of released ones."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.joined import joined
from moemerge.errors import CheckpointError
from moemerge.families.dense import Role
from moemerge.families.family import MoeFamily
from moemerge.families.layer_names import in_layer, layer_prefix

_EXPERT: Final = "{expert}"
_GRANITE: Final = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}
_RENAMED: Final[Mapping[str, Mapping[str, str]]] = {
    "mixtral": {"mlp.": "block_sparse_moe."},
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "ernie4_5_moe": {"mlp.gate.moe_statics.": "mlp.moe_statics."},
    "exaone_moe": {"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
    "hy_v3": {
        "mlp.gate.weight": "mlp.router.gate.weight",
        "mlp.e_score_correction_bias": "mlp.expert_bias",
        "mlp.shared_experts.": "mlp.shared_mlp.",
    },
    "mimo_v2_flash": {"self_attn.sinks": "self_attn.attention_sink_bias"},
}
"""Beginnings of names within a layer in memory, by family, each with that of released checkpoints.

It is `transformers/conversion_mapping.py` of transformers 5.23 read backwards, without the stacks of experts.
"""
_STACKS: Final[Mapping[str, tuple[Role, ...]]] = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Tensors (expert, row, column) in memory, by their names after the experts' module.

Each is listed with the projections that it has below each other.
"""


def released_layout(family: MoeFamily, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Give a mixture's tensors the names and shapes of its family's released checkpoints.

    A renamed tensor, or a slice of a stack, has the stored name in `TensorInfo.name`. No family has matrices that are
    transposed in memory.

    Args:
        family: the mixture's family.
        tensors: all tensors by stored name, in the layout of released checkpoints, in that which transformers 5 has
            in memory, or in that which it saves, which alone has single experts for qwen3_5_moe_text.

    Raises:
        CheckpointError: layouts are mixed, or experts are incomplete.
    """
    found: dict[str, TensorInfo] = {}
    in_memory, as_released = "", ""
    for name, tensor in tensors.items():
        parts = dict(_parts(family, name, tensor))
        found |= parts
        if name not in parts:
            in_memory = in_memory or name
        elif _is_released_alone(family, name):
            as_released = as_released or name
    if in_memory and as_released:
        raise CheckpointError(
            f"{as_released} is named as released checkpoints of {family.model_type} name it, {in_memory} as "
            "transformers 5 does in memory: the folder holds parts of two checkpoints. Remove one."
        )
    routers = {layer: found[name] for name in found if (layer := _layer_of_router(family, name)) is not None}
    for layer, router in routers.items():
        count = next(iter(router.shape), 0)
        _stack(family, found, layer, count)
        _check_complete(family, found, layer, count)
    return found


def _layer_of_router(family: MoeFamily, name: str) -> int | None:
    place = in_layer(name)
    return place[0] if place and place[1] == family.router else None


def _parts(family: MoeFamily, name: str, tensor: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the parts of a tensor with their released names; a tensor that has its own there is the only part."""
    place = in_layer(name)
    if place is None:
        yield name, tensor
        return
    layer, inner = place
    for before, after in _RENAMED.get(family.model_type, {}).items():
        if inner.startswith(before):
            inner = after + inner.removeprefix(before)
            break
    module = _module(family)
    roles = _STACKS.get(inner.removeprefix(module)) if module and inner.startswith(module) else None
    if roles is None:
        yield layer_prefix(layer) + inner, tensor
        return
    if len(tensor.shape) != 3 or tensor.shape[1] % len(roles):  # noqa: PLR2004
        raise CheckpointError(
            f"{name}: a stack of experts has a shape (expert, row, column), with as many rows for each of "
            f"{', '.join(roles)}; found {list(tensor.shape)}."
        )
    count, height, width = tensor.shape
    rows = height // len(roles)
    flat = replace(tensor, shape=(count * height, width))
    names = {role: own for own, (role, *_) in family.experts.items()}
    for expert in range(count):
        for number, role in enumerate(roles):
            own = layer_prefix(layer) + names[role].format(expert=expert)
            yield own, flat.rows(expert * height + number * rows, rows)


def _is_released_alone(family: MoeFamily, name: str) -> bool:
    """Whether only released checkpoints have this name."""
    inner = (in_layer(name) or (0, ""))[1]
    module = _module(family)
    numbered = bool(module and re.match(rf"{re.escape(module)}\d+\.", inner))
    return numbered or inner.startswith(tuple(_RENAMED.get(family.model_type, {}).values()))


def _stack(family: MoeFamily, tensors: dict[str, TensorInfo], layer: int, count: int) -> None:
    """Put the stacks that a family's released checkpoints have in the place of a layer's single experts."""
    for own, roles in family.experts.items():
        module, stack = own.rpartition(".")[0], layer_prefix(layer) + own
        names = [
            f"{layer_prefix(layer)}{module}.{expert}.{role}_proj.weight" for expert in range(count) for role in roles
        ]
        if not own.endswith("_proj") or not all(name in tensors for name in names):
            continue
        if stack in tensors:
            raise CheckpointError(
                f"{names[0]} is there beside {stack}, which holds the same experts: the folder holds parts of two "
                "checkpoints. Remove one."
            )
        parts = tuple(tensors[name] for name in names)
        if len({(part.dtype, part.shape) for part in parts}) == 1 and len(parts[0].shape) == 2:  # noqa: PLR2004
            rows, width = parts[0].shape
            tensors[stack] = replace(joined(stack, parts), shape=(count, len(roles) * rows, width))
            for name in names:
                del tensors[name]


def _check_complete(family: MoeFamily, tensors: Mapping[str, TensorInfo], layer: int, count: int) -> None:
    """Refuse a layer whose experts are not as many as its router has rows."""
    rows = f"{layer_prefix(layer)}{family.router} has a row for each of {count} experts"
    for own in family.experts:
        for expert in range(count if _EXPERT in own else 1):
            name = layer_prefix(layer) + own.format(expert=expert)
            held = tensors.get(name)
            if held is None or (_EXPERT not in own and held.shape[:1] != (count,)):
                raise CheckpointError(
                    f"{name} {'is missing' if held is None else f'has the shape {list(held.shape)}'}, but {rows}: the "
                    "checkpoint is incomplete, or its experts are packed in a way that is not read. Download it again, "
                    "or name the model that it was made from."
                )
        further = layer_prefix(layer) + own.format(expert=count)
        if _EXPERT in own and further in tensors:
            raise CheckpointError(
                f"{further} is there, but {rows}: the checkpoint is not what it says. Download it again."
            )


def _module(family: MoeFamily) -> str:
    """The beginning of the names of experts' modules, before the expert's number; empty where experts are stacked."""
    before, numbered, _ = next(iter(family.experts)).partition(_EXPERT)
    return before if numbered else ""
