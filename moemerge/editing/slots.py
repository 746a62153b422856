"""The experts of an edited mixture: those of the mixture that it is made from, and FFNs of dense models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moemerge.checkpoint.column_slice import ColumnSlice
from moemerge.checkpoint.header import TensorInfo
from moemerge.families.dense import ModelTensors, Role
from moemerge.families.stored_mixture import StoredMixture


@dataclass(frozen=True)
class Kept:
    """An expert of the mixture that is edited, or some of its neurons."""

    numbers: Mapping[int, int]
    """Number of the expert in each layer that has a router."""
    part: int = 0
    parts: int = 1
    """It is one of so many equal parts of the expert's neurons."""
    scale: float = 1.0
    """Factor on the down projection."""
    noise_scale: float = 0.0
    """Standard deviation of Gaussian noise that is added to its weights."""

    def width(self, mixture: StoredMixture) -> int:
        """Number of its neurons."""
        return mixture.expert_width // self.parts

    def projection(self, mixture: StoredMixture, layer: int, role: Role) -> TensorInfo:
        """One projection of its FFN: (width, hidden), and (hidden, width) for `down`."""
        whole, width = mixture.projection(layer, self.numbers[layer], role), self.width(mixture)
        if self.parts == 1:
            return whole
        first = self.part * width
        return ColumnSlice(whole, first, width).tensor() if role == "down" else whole.rows(first, width)

    @property
    def is_whole(self) -> bool:
        """Whether it is an expert as it is stored."""
        return replace(self, numbers={}) == Kept({})


@dataclass(frozen=True)
class Added:
    """An expert whose FFNs come from a dense model."""

    place: str
    """Its place in the config."""
    own: ModelTensors
    scale: float = 1.0
    noise_scale: float = 0.0

    def width(self, _mixture: StoredMixture) -> int:
        """Number of its neurons."""
        return self.own.model.sizes["ffn"]

    def projection(self, _mixture: StoredMixture, layer: int, role: Role) -> TensorInfo:
        """One projection of its FFN; see `Kept.projection`."""
        return self.own.projection(layer, role)


@dataclass(frozen=True)
class Foreign:
    """An expert of another mixture, which has router rows there."""

    place: str
    """Its place in the config."""
    other: StoredMixture
    number: int
    scale: float = 1.0
    noise_scale: float = 0.0

    def width(self, _mixture: StoredMixture) -> int:
        """Number of its neurons."""
        return self.other.expert_width

    def projection(self, _mixture: StoredMixture, layer: int, role: Role) -> TensorInfo:
        """One projection of its FFN; see `Kept.projection`."""
        return self.other.projection(layer, self.number, role)


New = Added | Foreign
"""An expert that the mixture does not have yet."""
Slot = Kept | New
"""An expert of the edited mixture."""
