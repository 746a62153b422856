"""The experts of an edited mixture: those of the mixture that it is made from, and FFNs of dense models."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moemerge.checkpoint.column_slice import ColumnSlice
from moemerge.checkpoint.derived import Derived, linear
from moemerge.checkpoint.header import TensorInfo
from moemerge.families.dense import ModelTensors, Role
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.reinitialising import Reinitialising


@dataclass(frozen=True, kw_only=True)
class _Changed:
    """What is changed of an expert's FFN."""

    part: int = 0
    parts: int = 1
    """It is one of so many equal parts of the expert's neurons."""
    scale: float = 1.0
    """Factor on the down projection."""
    noise_scale: float = 0.0
    """Standard deviation of Gaussian noise that is added to its weights."""
    reinit: Reinitialising | None = None
    """The neurons of the whole expert that are drawn anew, if some are."""

    def _change(self, whole: TensorInfo, layer: int, role: Role, width: int) -> TensorInfo:
        """The part of a projection that belongs to its own `width` neurons, some of them drawn anew."""
        whole = self.reinit.of(whole, layer, role) if self.reinit else whole
        if self.parts == 1:
            return whole
        first = self.part * width
        return ColumnSlice(whole, first, width).tensor() if role == "down" else whole.rows(first, width)


@dataclass(frozen=True)
class Kept(_Changed):
    """An expert of the mixture that is edited, or some of its neurons."""

    numbers: Mapping[int, int]
    """Number of the expert in each layer that has a router."""
    shares: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """Experts of which it is the weighted average, by layer, each with its share; they add up to 1."""

    def width(self, mixture: StoredMixture) -> int:
        """Number of its neurons."""
        return mixture.expert_width // self.parts

    def projection(self, mixture: StoredMixture, layer: int, role: Role) -> TensorInfo:
        """One projection of its FFN: (width, hidden), and (hidden, width) for `down`."""
        return self._change(self._whole(mixture, layer, role), layer, role, self.width(mixture))

    def _whole(self, mixture: StoredMixture, layer: int, role: Role) -> TensorInfo:
        shares = self.shares.get(layer)
        if not shares:
            return mixture.projection(layer, self.numbers[layer], role)
        inputs = tuple(mixture.projection(layer, expert, role) for expert in shares)
        weights = tuple(shares.values())
        made = Derived("average of experts", inputs, linear(weights), f"average {weights}", inputs[0].dtype)
        return made.tensor(inputs[0].name)

    def made_of(self) -> set[int]:
        """Numbers of the mixture's experts that it is made of, in any layer."""
        return {*self.numbers.values(), *(number for shares in self.shares.values() for number in shares)}

    @property
    def is_whole(self) -> bool:
        """Whether it is an expert as it is stored."""
        return replace(self, numbers={}) == Kept({})


@dataclass(frozen=True)
class Added(_Changed):
    """An expert whose FFNs come from a dense model, or some of its neurons."""

    place: str
    """Its place in the config."""
    own: ModelTensors

    def width(self, _mixture: StoredMixture) -> int:
        """Number of its neurons."""
        return max(self.own.model.ffn_widths) // self.parts

    def projection(self, _mixture: StoredMixture, layer: int, role: Role) -> TensorInfo:
        """One projection of its FFN; see `Kept.projection`. In some layers it may be narrower than in others."""
        width = self.own.model.ffn_widths[layer] // self.parts
        return self._change(self.own.projection(layer, role), layer, role, width)


@dataclass(frozen=True)
class Foreign(_Changed):
    """An expert of another mixture, or some of its neurons, which has router rows there."""

    place: str
    """Its place in the config."""
    other: StoredMixture
    number: int

    def width(self, _mixture: StoredMixture) -> int:
        """Number of its neurons."""
        return self.other.expert_width // self.parts

    def projection(self, _mixture: StoredMixture, layer: int, role: Role) -> TensorInfo:
        """One projection of its FFN; see `Kept.projection`."""
        return self._change(self.other.projection(layer, self.number, role), layer, role, self.width(_mixture))


New = Added | Foreign
"""An expert that the mixture does not have yet."""
Slot = Kept | New
"""An expert of the edited mixture."""
