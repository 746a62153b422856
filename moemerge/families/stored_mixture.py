"""A mixture as it is stored: the table of its family, read backwards."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from moemerge.checkpoint.derived import read_values
from moemerge.checkpoint.header import TensorInfo
from moemerge.families.choosing import Choosing, choosing
from moemerge.families.dense import ROLES, Role
from moemerge.families.family import SWITCHED_OFF, MoeFamily, Names
from moemerge.families.layer_names import in_layer, layer_prefix

_EXPERT: Final = "{expert}"


@dataclass(frozen=True)
class StoredMixture:
    """A mixture's config and tensors, in the layout of its family's released checkpoints."""

    family: MoeFamily
    config: Mapping[str, Any]
    """Its `config.json`."""
    tensors: Mapping[str, TensorInfo]
    """All its tensors by name, as `moemerge.families.in_memory.released_layout` gives them."""
    names: tuple[str, ...]
    """Names of its experts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(self.tensors))

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have a router, ascending; those that predict further tokens are among them."""
        return tuple(sorted(layer for layer, held in self._layers.items() if self.family.router in held))

    @cached_property
    def further_layers(self) -> tuple[int, ...]:
        """Those of `moe_layers` beyond `num_hidden_layers`, which predict further tokens; no text enters them."""
        layers = self.config.get("num_hidden_layers")
        return tuple(layer for layer in self.moe_layers if isinstance(layers, int) and layer >= layers)

    @cached_property
    def experts_outside(self) -> tuple[str, ...]:
        """Names of routers and experts outside all layers, such as `mtp.layers.0.mlp.gate.weight`, in their order."""
        modules = {name.split(_EXPERT)[0].removesuffix(name.rpartition(".")[2]) for name in self.family.experts}
        named = [*map(re.escape, sorted(modules)), rf"{re.escape(self.family.router)}$"]
        held = re.compile(rf"(^|\.)({'|'.join(named)})")
        return tuple(name for name in self.tensors if in_layer(name) is None and held.search(name))

    @property
    def layers(self) -> int:
        """Number of its layers, without those that predict further tokens."""
        return int(self.config["num_hidden_layers"])

    @property
    def experts(self) -> int:
        """Number of its experts, the same in all layers."""
        return len(self.names)

    @property
    def experts_per_token(self) -> int:
        """How many experts take each token; where layers differ, the most."""
        given = self.config[per_token_key(self.family)]
        return given if isinstance(given, int) else max(given)

    @cached_property
    def choosing(self) -> Choosing:
        """How its routers choose, and whether they divide the weights of the chosen experts by their sum."""
        return choosing(self.family, self.config)

    @cached_property
    def expert_width(self) -> int:
        """Number of neurons in each expert's FFN."""
        return self.projection(self.moe_layers[0], 0, "down").shape[-1]

    @property
    def hidden(self) -> int:
        """Width of the router inputs."""
        return self.router(self.moe_layers[0]).shape[-1]

    def layer(self, layer: int) -> Mapping[str, TensorInfo]:
        """A layer's tensors, by their names within it."""
        return self._layers.get(layer, {})

    def switched_off(self, layer: int) -> frozenset[int]:
        """Numbers of the experts that a layer's selection bias switches off.

        Raises:
            CheckpointError: the bias cannot be read.
        """
        bias = self.by_expert(layer).get(self.family.selection_bias)
        # Between the two numbers lie no biases of others, however these are rounded.
        off = read_values(bias).reshape(-1) <= SWITCHED_OFF / 2 if bias else np.zeros(0, bool)
        return frozenset(off.nonzero()[0].tolist())

    def router(self, layer: int) -> TensorInfo:
        """A layer's router (expert, hidden)."""
        return self._layers[layer][self.family.router]

    @cached_property
    def routers(self) -> frozenset[str]:
        """Names of all routers."""
        return frozenset(self.path(layer, self.family.router) for layer in self.moe_layers)

    def by_expert(self, layer: int) -> Mapping[str, TensorInfo]:
        """A layer's tensors with an entry for each expert (expert, ...), by their names within it.

        These are the router, the selection bias, other vectors with a number for each expert, and stacks of FFNs.
        """
        return self._by_expert[layer]

    @cached_property
    def _by_expert(self) -> dict[int, dict[str, TensorInfo]]:
        return {layer: self._entries(held) for layer, held in self._layers.items()}

    def _entries(self, held: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        family = self.family
        axes = {family.router: ("experts", "hidden"), family.selection_bias: family.bias_axes}
        axes |= {extra.name: extra.axes for extra in family.extras if "experts" in extra.axes}
        stacks = [name for name in family.experts if _EXPERT not in name]
        found = {name: _experts_first(held[name], named) for name, named in axes.items() if name in held}
        return found | {name: held[name] for name in stacks if name in held}

    def of_expert(self, layer: int, expert: int) -> Mapping[str, TensorInfo]:
        """The tensors of one expert alone, by their names within the layer with `{expert}` for its number.

        They are all that the expert's module holds, also what the family's table does not name, such as scales.
        """
        return self._of_expert[layer].get(expert, {})

    @cached_property
    def _of_expert(self) -> dict[int, dict[int, dict[str, TensorInfo]]]:
        """The tensors of single experts by layer and expert: each name is read once, whatever is asked later."""
        found: dict[int, dict[int, dict[str, TensorInfo]]] = {layer: {} for layer in self._layers}
        for module in self._modules:
            own = re.compile(rf"{re.escape(module)}(0|[1-9]\d*)\.(.+)")
            for layer, held in self._layers.items():
                for name, tensor in held.items():
                    if match := own.fullmatch(name):
                        found[layer].setdefault(int(match[1]), {})[f"{module}{_EXPERT}.{match[2]}"] = tensor
        return found

    def projection(self, layer: int, expert: int, role: Role) -> TensorInfo:
        """One projection of an expert's FFN: (width, hidden), and (hidden, width) for `down`.

        Raises:
            KeyError: the layer has no such expert.
        """
        for name, roles in self.family.experts.items():
            if role in roles:
                tensor = self._layers[layer][name.format(expert=expert)]
                return _part(tensor if _EXPERT in name else _entry(tensor, expert), roles.index(role), len(roles))
        raise KeyError(role)

    def shared_projection(self, layer: int, role: Role) -> TensorInfo | None:
        """One projection of a layer's shared expert; None if the layer has none."""
        names: Names = self.family.shared.names if self.family.shared else {}
        for name, roles in names.items():
            if role in roles and name in self._layers[layer]:
                return _part(self._layers[layer][name], roles.index(role), len(roles))
        return None

    def shared_ffn(self, layer: int) -> dict[Role, TensorInfo] | None:
        """All projections of a layer's shared expert, as they are stored; None if the layer has none."""
        parts = {role: self.shared_projection(layer, role) for role in ROLES}
        found = {role: part for role, part in parts.items() if part is not None}
        return found if len(found) == len(ROLES) else None

    @cached_property
    def _layers(self) -> dict[int, dict[str, TensorInfo]]:
        found: dict[int, dict[str, TensorInfo]] = {}
        for name, tensor in self.tensors.items():
            if place := in_layer(name):
                found.setdefault(place[0], {})[place[1]] = tensor
        return found

    @property
    def _modules(self) -> Iterator[str]:
        """Beginnings of the names of experts' modules, before the expert's number."""
        yield from dict.fromkeys(name.split(_EXPERT)[0] for name in self.family.experts if _EXPERT in name)

    def is_expert(self, name: str) -> bool:
        """Whether a tensor belongs to experts: a projection, a scale of one, or an entry for each expert."""
        return name in self._names_of_experts

    @cached_property
    def _names_of_experts(self) -> frozenset[str]:
        owned = []
        for layer in self.moe_layers:
            inner = [*self.by_expert(layer)]
            for expert, held in self._of_expert[layer].items():
                inner += [name.format(expert=expert) for name in held]
            owned += [self.path(layer, name) for name in inner]
        return frozenset(owned)

    def path(self, layer: int, name: str) -> str:
        """The whole name of a layer's tensor."""
        return layer_prefix(layer) + name


def number_of(name: str, mixture: StoredMixture) -> int | str:
    """The number of one of a mixture's experts by its name or, where none is called so, its number.

    A returned text says why there is none.
    """
    if name in mixture.names:
        return mixture.names.index(name)
    if name.isdecimal() and int(name) < mixture.experts:
        return int(name)
    names = "" if mixture.names == tuple(map(str, range(mixture.experts))) else f", or {', '.join(mixture.names)}"
    return f"the mixture has no expert {name!r}: name one by its number, 0 to {mixture.experts - 1}{names}"


def per_token_key(family: MoeFamily) -> str:
    """The key of `config.json` for the number of experts per token."""
    return next(key for key, name in family.named.items() if name.endswith("experts_per_token"))


def _experts_first(tensor: TensorInfo, axes: tuple[str, ...]) -> TensorInfo:
    """The tensor with the axis of experts first; the axes before it have length 1."""
    return replace(tensor, shape=tensor.shape[axes.index("experts") :])


def _entry(stack: TensorInfo, expert: int) -> TensorInfo:
    """One expert's matrix of a stack (expert, row, column).

    Raises:
        KeyError: there is no such expert.
    """
    if expert not in range(stack.shape[0]):
        raise KeyError(expert)
    entry = stack.rows(expert, 1)
    return replace(entry, shape=entry.shape[1:])


def _part(tensor: TensorInfo, part: int, parts: int) -> TensorInfo:
    """One of `parts` equal runs of rows."""
    rows = tensor.shape[0] // parts
    return tensor.rows(part * rows, rows) if parts > 1 else tensor
