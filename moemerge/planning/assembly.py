"""Decide from tensor tables alone what each tensor of the merged model is made of."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from moemerge.checkpoint.derived import plus
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.joined import rows_apart
from moemerge.checkpoint.pieces import Band, Fill, Piece
from moemerge.dtypes import HeaderDType
from moemerge.families.dense import ModelTensors, Role
from moemerge.families.family import SWITCHED_OFF, Extra, MoeFamily, separate
from moemerge.families.layer_names import ROTATED, layer_prefix
from moemerge.families.mixture_shape import Mixture
from moemerge.planning.output import Computed, Output
from moemerge.planning.reinitialising import Reinitialising

_USUAL_FFN: Final = separate("mlp")
_NORM: Final = re.compile(r"norm\.weight$")


@dataclass(frozen=True)
class Source:
    """A model that FFNs are taken from, with the scale and noise that are applied to them."""

    own: ModelTensors
    scale: float = 1.0
    """Factor on what the FFN adds to the residual stream."""
    noise_scale: float = 0.0
    reinit: Reinitialising | None = None
    """The neurons that are drawn anew, if some are."""

    def width(self, layer: int) -> int:
        """Number of neurons in a layer's FFN."""
        return self.own.model.ffn_widths[layer]

    def projection(self, layer: int, role: Role, dtype: HeaderDType) -> Piece:
        """Find one projection of a layer's FFN, which may be part of a larger tensor."""
        tensor = self.own.projection(layer, role)
        tensor = self.reinit.of(tensor, layer, role) if self.reinit else tensor
        return Piece(tensor, dtype, self.scale if role == "down" else 1.0, self.noise_scale)


@dataclass(frozen=True)
class Assembly:
    """Everything that decides the tensors of a merge."""

    family: MoeFamily
    mixture: Mixture
    base: Source
    experts: Sequence[Source]
    shared: Sequence[Source]
    computes_gate: bool
    """Whether the shared expert's gate is made from prompts; otherwise it is 0, a weight of one half."""
    dtype: HeaderDType
    """Dtype of the merged model, as a safetensors header spells it."""

    def outputs(self) -> dict[str, Output]:
        """All tensors of the merged model by name, in the order of the layers; routers last."""
        model, tensors = self.base.own.model, self.base.own.tensors
        outputs = {name: self._whole(name) for name in model.first}
        for layer in range(model.layers):
            outputs |= dict(self._attention(layer)) | dict(self._ffns(layer))
        outputs[model.family.last] = self._whole(model.family.last)
        if model.family.head in tensors:
            outputs[model.family.head] = self._whole(model.family.head)
        # Routers come last, so that all shards but the last are complete without them.
        hidden = model.sizes["hidden"]
        for layer in self.mixture.moe_layers:
            name = layer_prefix(layer) + self.family.router
            outputs[name] = Output((len(self.experts), hidden), Computed(layer, "router"))
            if self.computes_gate and self.family.shared:
                name = layer_prefix(layer) + self.family.shared.gate
                outputs[name] = Output((1, hidden), Computed(layer, "shared gate"))
        return outputs

    def _whole(self, name: str) -> Output:
        tensor = self._offset(self.base.own.tensors[name])
        return Output(tensor.shape, tuple((Piece(part, self.dtype),) for part in rows_apart(tensor)))

    def _offset(self, tensor: TensorInfo) -> TensorInfo:
        """Add to a norm's weights what the base model's norms add to them and the output family's do not."""
        missing = self.base.own.model.family.norm_offset - self.family.norm_offset
        return plus(tensor, missing) if missing and _NORM.search(tensor.name) else tensor

    def _attention(self, layer: int) -> Iterator[tuple[str, Output]]:
        """Yield a layer's tensors beside its FFN, and those that only the output family has."""
        model, prefix = self.base.own.model, layer_prefix(layer)
        names = model.tensors(layer)
        regroups = model.family.interleaved and not self.family.interleaved
        for name in names:
            tensor = self._offset(self.base.own.tensors[name])
            parts = model.family.splits.get(name.removeprefix(prefix), {})
            first = 0
            for part, axis in parts.items():
                rows = tensor.rows(first, model.sizes[axis])
                first += model.sizes[axis]
                yield prefix + part, Output(rows.shape, ((Piece(rows, self.dtype),),))
            if not parts:
                turned = (model.sizes["head"], model.rotated_rows) if regroups and ROTATED.search(name) else (0, 0)
                piece = Piece(tensor, self.dtype, head_rows=turned[0], rotated_rows=turned[1])
                yield name, Output(tensor.shape, ((piece,),))
        attends = any(name.startswith(f"{prefix}self_attn.") for name in names)
        for extra in self.family.extras:
            needless = prefix + extra.name in names or (extra.name.startswith("self_attn.") and not attends)
            if not needless and (not extra.when or model.facts.intersection(extra.when)):
                yield prefix + extra.name, self._extra(prefix, extra)

    def _extra(self, prefix: str, extra: Extra) -> Output:
        sizes = self.base.own.model.sizes | {"experts": len(self.experts)}
        shape = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in extra.axes)
        if not extra.source:
            return Output(shape, ((Piece(Fill(extra.value, shape), self.dtype),),))
        scale = sizes["hidden"] ** 0.5 if extra.scale == "sqrt hidden" else 1.0
        return Output(shape, ((Piece(self.base.own.tensors[prefix + extra.source], self.dtype, scale),),))

    def _ffns(self, layer: int) -> Iterator[tuple[str, Output]]:
        """Yield the tensors of a layer's experts, shared expert and selection bias, or of its dense FFN."""
        family, mixture, prefix = self.family, self.mixture, layer_prefix(layer)
        routed = layer in mixture.moe_layers
        if not routed or family.keeps_dense_ffn:
            for name, roles in (family.dense_ffn or _USUAL_FFN).items():
                yield prefix + name, self._ffn([self.base], roles, layer, self.base.width(layer))
        if not routed:
            return
        absent = mixture.absent.get(layer, frozenset())
        appended = [] if family.shared else list(self.shared)
        width = family.expert_width(mixture)
        blocks = [[] if expert in absent else [source, *appended] for expert, source in enumerate(self.experts)]
        for name, roles in family.experts.items():
            if "{expert}" in name:
                for expert, sources in enumerate(blocks):
                    made = self._ffn(sources, roles, layer, width)
                    yield prefix + name.format(expert=expert), replace(made, is_expert=True)
            else:
                stack = [self._ffn(sources, roles, layer, width) for sources in blocks]
                bands = tuple(band for ffn in stack for band in ffn.bands)
                yield prefix + name, Output((len(stack), *stack[0].shape), bands, is_expert=True)
        if family.selection_bias:
            yield prefix + family.selection_bias, self._selection_bias(absent)
        if family.shared:
            yield from self._shared(prefix, layer)

    def _shared(self, prefix: str, layer: int) -> Iterator[tuple[str, Output]]:
        shared, width = self.family.shared, self.family.shared_width(self.mixture)
        if shared is None or (width == 0 and shared.absent == "nothing"):
            return
        for name, roles in shared.names.items():
            yield prefix + name, self._ffn(self.shared, roles, layer, width)
        if shared.gate and not self.computes_gate:
            shape = (1, self.base.own.model.sizes["hidden"])
            yield prefix + shared.gate, Output(shape, ((Piece(Fill(0.0, shape), self.dtype),),))

    def _ffn(self, sources: Sequence[Source], roles: tuple[Role, ...], layer: int, width: int) -> Output:
        """Put the neurons of all `sources` side by side in one FFN, padded to `width` with neurons of zeros."""
        hidden = self.base.own.model.sizes["hidden"]
        shape = (hidden, width) if roles == ("down",) else (width * len(roles), hidden)
        padding = width - sum(source.width(layer) for source in sources)
        bands: list[Band] = []
        for role in roles if width else ():
            pieces = [source.projection(layer, role, self.dtype) for source in sources]
            empty = (hidden, padding) if role == "down" else (padding, hidden)
            pieces += [Piece(Fill(0.0, empty), self.dtype)] if padding else []
            bands += [tuple(pieces)] if role == "down" else [(piece,) for piece in pieces]
        return Output(shape, tuple(bands))

    def _selection_bias(self, absent: frozenset[int]) -> Output:
        shape = tuple(1 if axis == "1" else len(self.experts) for axis in self.family.bias_axes)
        values = [SWITCHED_OFF if expert in absent else 0.0 for expert in range(len(self.experts))]
        return Output(shape, tuple((Piece(Fill(value, (1,)), self.dtype),) for value in values))
