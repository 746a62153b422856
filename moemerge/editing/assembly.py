"""Decide what each tensor of an edited mixture is made of: from tensor tables, and a few numbers for new experts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from types import MappingProxyType

from moemerge.checkpoint.derived import read_values
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Fill, Piece
from moemerge.dtypes import HeaderDType
from moemerge.editing.granularity import bias_factor, split
from moemerge.editing.shared_width import shared_width
from moemerge.editing.slots import Foreign, Kept, Slot
from moemerge.families.dense import Role
from moemerge.families.layer_names import layer_prefix
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.output import Computed, Output

_EXPERT = "{expert}"


@dataclass(frozen=True)
class EditAssembly:
    """Everything that decides the tensors of an edited mixture."""

    mixture: StoredMixture
    experts: Sequence[Slot]
    """The experts of the result, before they are split."""
    parts: int
    """The number of parts that each of them is split into."""
    width: int
    """Neurons that are stored for every expert, or part of one; narrower ones are padded with zeros."""
    computes_routers: bool
    """Whether some router rows are computed while the other tensors are copied."""
    shared: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Tensors that take the place of the mixture's own, by name."""

    @cached_property
    def slots(self) -> Sequence[Slot]:
        """The experts that are stored."""
        return split(self.experts, self.mixture, self.parts)

    @cached_property
    def _mixed(self) -> StoredMixture:
        """The mixture with the tensors that take the place of its own."""
        return replace(self.mixture, tensors={**self.mixture.tensors, **self.shared})

    def outputs(self) -> dict[str, Output]:
        """All tensors of the result by name, in the order in which they are stored; routers last."""
        mixture = self.mixture
        outputs: dict[str, Output] = {}
        begun: set[int] = set()
        owners = {
            layer_prefix(layer) + name: layer for layer in mixture.moe_layers for name in self._names_of_experts(layer)
        }
        shared = dict(self._shared())
        for name, tensor in mixture.tensors.items():
            layer = owners.get(name)
            if layer is None:
                whole = Output(tensor.shape, ((Piece(self.shared.get(name, tensor), tensor.dtype),),))
                outputs[name] = shared.get(name, whole)
            elif layer not in begun:
                begun.add(layer)
                outputs |= {layer_prefix(layer) + inner: made for inner, made in self._experts(layer)}
        for layer in mixture.moe_layers:
            outputs[layer_prefix(layer) + mixture.family.router] = self._router(layer)
        return outputs

    def _names_of_experts(self, layer: int) -> Iterator[str]:
        yield from self.mixture.by_expert(layer)
        for expert in range(self.mixture.experts):
            yield from (name.format(expert=expert) for name in self.mixture.of_expert(layer, expert))

    def _experts(self, layer: int) -> Iterator[tuple[str, Output]]:
        """Yield a layer's FFNs, and its vectors with a number for each expert, but no router."""
        family, mixture = self.mixture.family, self.mixture
        for name, roles in family.experts.items():
            if _EXPERT not in name:
                made = [self._ffn(slot, layer, roles) for slot in self.slots]
                bands = tuple(chain.from_iterable(ffn.bands for ffn in made))
                yield name, Output((len(made), *made[0].shape), bands, is_expert=True)
        made_of = [self._own(slot, layer) for slot in self.slots]
        for name in dict.fromkeys([name for name in family.experts if _EXPERT in name] + [*chain(*made_of)]):
            yield from ((name.format(expert=number), own[name]) for number, own in enumerate(made_of) if name in own)
        for name, tensor in mixture.by_expert(layer).items():
            if name != family.router and name not in family.experts:
                yield name, self._vector(layer, name, tensor)

    def _own(self, slot: Slot, layer: int) -> dict[str, Output]:
        """Make the tensors of one expert alone, by their names within the layer with `{expert}` for its number."""
        if isinstance(slot, Kept) and self._is_copied(slot):
            held = self.mixture.of_expert(layer, slot.numbers[layer])
            return {name: Output(t.shape, ((Piece(t, t.dtype),),), is_expert=True) for name, t in held.items()}
        names = {name: roles for name, roles in self.mixture.family.experts.items() if _EXPERT in name}
        return {name: self._ffn(slot, layer, roles) for name, roles in names.items()}

    def _shared(self) -> Iterator[tuple[str, Output]]:
        """Yield the shared experts' tensors, where the family holds them in widths of the others, which has changed."""
        mixture, shared = self._mixed, self.mixture.family.shared
        for layer in mixture.moe_layers if shared else ():
            down, held = mixture.shared_projection(layer, "down"), mixture.layer(layer)
            width = shared_width(mixture.family, down, self.width) if down else None
            if shared is None or down is None or width is None or width == (own := down.shape[-1]):
                continue
            for name, roles in shared.names.items():
                made = self._padded(partial(self._shared_piece, layer), roles, own, width)
                yield layer_prefix(layer) + name, replace(made, is_expert=False)
                bias = f"{name.removesuffix('.weight')}.bias"
                if bias in held and held[bias].shape == (own,):
                    padding = (Piece(Fill(0.0, (width - own,)), held[bias].dtype),)
                    yield (
                        layer_prefix(layer) + bias,
                        Output((width,), ((Piece(held[bias], held[bias].dtype),), padding)),
                    )

    def _shared_piece(self, layer: int, role: Role) -> Piece:
        tensor = self._mixed.shared_projection(layer, role)
        if tensor is None:
            raise KeyError(role)
        return Piece(tensor, tensor.dtype)

    def _is_copied(self, slot: Kept) -> bool:
        return slot.is_whole and self.width == self.mixture.expert_width

    def _ffn(self, slot: Slot, layer: int, roles: tuple[Role, ...]) -> Output:
        """Make one tensor of an expert's FFN, padded to `width` with neurons of zeros."""
        dtype = self._dtype(layer, roles[0])

        def piece(role: Role) -> Piece:
            scale = slot.scale if role == "down" else 1.0
            return Piece(slot.projection(self.mixture, layer, role), dtype, scale, slot.noise_scale)

        own = slot.projection(self.mixture, layer, "down").shape[-1]
        return self._padded(piece, roles, own, self.width)

    def _padded(self, piece: Callable[[Role], Piece], roles: tuple[Role, ...], own: int, width: int) -> Output:
        """Put the projections of an FFN with `own` neurons below each other, padded to `width` with zeros."""
        hidden, padding = self.mixture.hidden, width - own
        bands: list[Band] = []
        for role in roles:
            pieces = [piece(role)]
            empty = (hidden, padding) if role == "down" else (padding, hidden)
            pieces += [Piece(Fill(0.0, empty), pieces[0].dtype)] if padding else []
            bands += [tuple(pieces)] if role == "down" else [(one,) for one in pieces]
        shape = (hidden, width) if roles == ("down",) else (width * len(roles), hidden)
        return Output(shape, tuple(bands), is_expert=True)

    def _dtype(self, layer: int, role: Role) -> HeaderDType:
        return self.mixture.projection(layer, 0, role).dtype

    def _vector(self, layer: int, name: str, tensor: TensorInfo) -> Output:
        """Make a vector with a number for each expert; a new one has that of its own mixture, or the neutral number.

        Its selection bias is the mean of those of the experts that stay: beside trained biases far from 0, a bias of 0
        would choose it always or never.
        """
        family = self.mixture.family
        neutral = {extra.name: extra.value for extra in family.extras}
        shape = tuple(1 if axis == "1" else len(self.slots) for axis in family.bias_axes)
        if name != family.selection_bias:
            theirs = {
                number: slot.other.by_expert(layer)[name].rows(slot.number, 1)
                for number, slot in enumerate(self.slots)
                if isinstance(slot, Foreign) and name in slot.other.by_expert(layer)
            }
            return Output((len(self.slots),), self._rows(layer, tensor, neutral.get(name, 0.0), theirs=theirs))
        factor = bias_factor(self.mixture, self.parts)
        off = self.mixture.switched_off(layer) if factor != 1 else frozenset()
        return Output(
            shape, self._rows(layer, tensor, factor * self._mean_bias(layer, tensor), scale=factor, unscaled=off)
        )

    def _mean_bias(self, layer: int, tensor: TensorInfo) -> float:
        """The mean selection bias (expert,) of the experts that stay and are present in a layer; 0 if none is new."""
        kept = [slot.numbers[layer] for slot in self.experts if isinstance(slot, Kept)]
        if len(kept) == len(self.experts):
            return 0.0
        present = [number for number in kept if number not in self.mixture.switched_off(layer)]
        return float(read_values(tensor)[present].mean()) if present else 0.0

    def _router(self, layer: int) -> Output:
        router = self.mixture.router(layer)
        shape = (len(self.slots), *router.shape[1:])
        if self.computes_routers:
            return Output(shape, Computed(layer, "router"))
        return Output(shape, self._rows(layer, router, 0.0))

    def _rows(
        self,
        layer: int,
        tensor: TensorInfo,
        neutral: float,
        *,
        scale: float = 1.0,
        unscaled: frozenset[int] = frozenset(),
        theirs: Mapping[int, TensorInfo] = MappingProxyType({}),
    ) -> tuple[Band, ...]:
        """Take the entry of each expert from a tensor (expert, ...); entries that follow each other are one piece.

        Parts of an expert have equal entries; those of `unscaled` experts are not multiplied by `scale`. A new expert
        has the entry in `theirs`, by its number in the result, or else `neutral`.
        """
        runs: list[tuple[int, int]] = []
        bands: list[Band] = []
        for place, slot in enumerate(self.slots):
            if not isinstance(slot, Kept):
                given = theirs.get(place) or Fill(neutral, (1, *tensor.shape[1:]))
                runs.append((-1, 1))
                bands.append((Piece(given, tensor.dtype),))
                continue
            number = slot.numbers[layer]
            follows = bool(runs) and runs[-1][0] >= 0 and number == sum(runs[-1])
            if follows and (number in unscaled) == (runs[-1][0] in unscaled):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                bands.pop()
            else:
                runs.append((number, 1))
            factor = 1.0 if number in unscaled else scale
            bands.append((Piece(tensor.rows(*runs[-1]), tensor.dtype, factor),))
        return tuple(bands)
