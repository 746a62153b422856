"""The plan of an edit: every tensor of the edited mixture, where its bytes come from and where they go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.shards import TensorSpec
from moemerge.config.schema import CONFIG_COPY, MergeConfig
from moemerge.dtypes import bytes_of
from moemerge.editing.planned_model import PlannedModel
from moemerge.editing.slots import Kept, New, Slot
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.origins import remote_bytes
from moemerge.planning.output import Computed, Output


@dataclass(frozen=True, kw_only=True)
class EditPlan(PlannedModel):
    """An edit, completely decided and immutable; nothing has been written yet."""

    config: MergeConfig
    """The edit as a config: its base model is the mixture, its experts are those of the result."""
    mixture: StoredMixture
    """The mixture that is edited."""
    slots: tuple[Slot, ...]
    """The experts of the result, before they are split into as many parts as `config.granularity` says."""
    outputs: Mapping[str, Output]
    """All tensors of the result by name, in the order in which they are stored; routers last."""
    warnings: tuple[str, ...]
    """Likely mistakes."""

    @property
    def other_names(self) -> Sequence[str]:
        """The config that says the same."""
        return (CONFIG_COPY,)

    @property
    def experts(self) -> int:
        """Number of the result's experts, parts counted."""
        return len(self.slots) * self.config.granularity

    @property
    def experts_per_token(self) -> int:
        """How many of the result's experts take each token, parts counted."""
        return self.config.experts_per_token * self.config.granularity

    @cached_property
    def computed(self) -> dict[str, Computed]:
        """Routers of which some rows are computed, by name."""
        return {name: o.origin for name, o in self.outputs.items() if isinstance(o.origin, Computed)}

    @cached_property
    def new(self) -> dict[int, New]:
        """Experts that the mixture does not have yet, by their numbers in the result."""
        return {number: slot for number, slot in enumerate(self.slots) if not isinstance(slot, Kept)}

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the mixture's experts that are in no layer of the result, and have not been replaced."""
        kept = {number for slot in self.slots if isinstance(slot, Kept) for number in slot.made_of()}
        gone = (name for number, name in enumerate(self.mixture.names) if number not in kept)
        return tuple(name for name in gone if name not in self.config.expert_names)

    @property
    def specs(self) -> list[TensorSpec]:
        """Name, dtype and shape of each tensor."""
        return specs_of(self.outputs, self.mixture)

    @property
    def origins_of_experts(self) -> list[tuple[str, str]]:
        """Name of each expert of the result, and where its FFNs come from, in words."""
        experts = zip(self.config.expert_names, self.config.experts, self.slots, strict=True)
        return [(name, self._origin(expert.source_model, slot)) for name, expert, slot in experts]

    def _origin(self, reference: str, slot: Slot) -> str:
        if not isinstance(slot, Kept):
            return reference
        numbers = set(slot.numbers.values())
        if slot.shares:
            named = ", ".join(self.mixture.names[number] for number in sorted(slot.made_of()))
            return f"averages of {named}, by layer"
        if len(numbers) > 1:
            return "another expert in each layer"
        number = numbers.pop()
        own = self.mixture.names[number]
        return f"expert {number}{'' if own == str(number) else f' ({own})'}"

    @property
    def total_parameters(self) -> int:
        """Number of parameters in all tensors."""
        return sum(math.prod(output.shape) for output in self.outputs.values())

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token passes through."""
        in_experts = sum(math.prod(output.shape) for output in self.outputs.values() if output.is_expert)
        return self.total_parameters - in_experts * (self.experts - self.experts_per_token) // self.experts

    @property
    def download_bytes(self) -> int:
        """Bytes that the edit reads from other machines."""
        pieces = [piece.source for output in self.outputs.values() for piece in output.pieces]
        return remote_bytes(piece for piece in pieces if isinstance(piece, TensorInfo))


def specs_of(outputs: Mapping[str, Output], mixture: StoredMixture) -> list[TensorSpec]:
    """Name, dtype and shape of each tensor of an edited mixture; a computed router has the dtype of the mixture's."""
    dtypes = [
        output.pieces[0].dtype if output.pieces else mixture.tensors[name].dtype for name, output in outputs.items()
    ]
    return [
        TensorSpec(name, dtype, output.shape, bytes_of(dtype, output.shape) or 0)
        for dtype, (name, output) in zip(dtypes, outputs.items(), strict=True)
    ]
