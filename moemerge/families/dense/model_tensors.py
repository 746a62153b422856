"""A dense model together with its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moemerge.checkpoint.header import TensorInfo
from moemerge.families.dense.family import Role
from moemerge.families.dense.model import DenseModel
from moemerge.families.layer_names import layer_prefix


@dataclass(frozen=True)
class ModelTensors:
    """A dense model's config and its tensors, stored or computed from others while they are read."""

    model: DenseModel
    tensors: Mapping[str, TensorInfo]
    """Its tensors by the names that the model gives them; a view that cannot be changed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(self.tensors))

    @property
    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the first layer's tensors."""
        return [tensor.shape for name, tensor in self.tensors.items() if name.startswith(layer_prefix(0))]

    def projection(self, layer: int, role: Role) -> TensorInfo:
        """Find one projection of a layer's FFN, which may be part of a larger tensor.

        Raises:
            KeyError: the model has no FFN in this layer.
        """
        projection = self.model.family.ffn[role]
        tensor = self.tensors[layer_prefix(layer) + projection.name]
        width = self.model.ffn_widths[layer]
        return tensor.rows(projection.part * width, width) if projection.parts > 1 else tensor
