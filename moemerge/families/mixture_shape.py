"""The shape of a mixture: how many experts of what width in which layers, before any family is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

ASKED: Final = {
    "dense_layers": "dense layers",
    "shared": "shared experts",
    "no_shared": "without shared experts",
}
"""Facts of a mixture, each with the words for it in messages."""


@dataclass(frozen=True)
class Mixture:
    """A mixture as the config asks for it, in numbers; widths count an FFN's neurons."""

    layers: int
    dense_width: int
    """Width of the base's FFN."""
    expert_widths: tuple[int, ...]
    shared_widths: tuple[int, ...]
    experts_per_token: int
    moe_layers: tuple[int, ...]
    """Layers with experts, in ascending order; the others keep the base's FFN."""
    absent: Mapping[int, frozenset[int]]
    """Experts that are absent from a layer, by layer; only layers with absent experts are listed."""

    @property
    def facts(self) -> frozenset[str]:
        """The facts of `ASKED` that hold."""
        held = {"dense_layers": self.dense_layers, "shared": self.shared_widths, "no_shared": not self.shared_widths}
        return frozenset(fact for fact, holds in held.items() if holds)

    @property
    def dense_layers(self) -> list[int]:
        """Layers that keep the base's FFN."""
        return sorted(set(range(self.layers)) - set(self.moe_layers))

    def values(self, expert_width: int, shared_width: int) -> dict[str, Any]:
        """Values that output families write into `config.json`, by name; the given widths are those that are stored."""
        dense = self.dense_layers
        shared_count = -(-shared_width // expert_width)
        return {
            "experts": len(self.expert_widths),
            "experts_per_token": self.experts_per_token,
            "expert_width": expert_width,
            "dense_width": self.dense_width,
            "shared_width": shared_width,
            "shared_count": shared_count,
            "dense_layers": dense,
            "dense_prefix": len(dense),
            "first_moe_layer": self.moe_layers[0],
            "last_moe_layer": self.moe_layers[-1],
            "mlp_layer_types": ["dense" if layer in dense else "sparse" for layer in range(self.layers)],
            "moe_layer_flags": [layer not in dense for layer in range(self.layers)],
            "by_layer.experts_per_token": [self.experts_per_token] * self.layers,
            "by_layer.expert_width": [expert_width] * self.layers,
            "by_layer.shared_count": [shared_count] * self.layers,
        }
