"""A mixture that is planned, as a model that can be run; what several of them have in common is read once."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from moemerge.checkpoint.files import File
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.evaluation.runnable import Runnable, as_model
from moemerge.families.stored_mixture import StoredMixture
from moemerge.merging.gguf import planned_table
from moemerge.merging.merge_work import router_bands
from moemerge.planning.plan import MergePlan
from moemerge.routers.initialisation import Routers

_EMBEDDINGS = "model.embed_tokens.weight"
# Of merges without --seed.
_SEED = 0


class LayerReads:
    """Reads models that run together; what several of them have in a layer is read once, and kept until the next one.

    Mixed weights are computed at each reading, so that a search would otherwise compute them for every recipe.
    """

    def __init__(self) -> None:
        self._layer: int | None = None
        self._held: dict[Hashable, torch.Tensor] = {}

    def reading(self, model: Runnable, contents: Mapping[str, Hashable]) -> Runnable:
        """Make the same model, which reads through this.

        Args:
            model: the model.
            contents: a value for each of its tensors that is equal for equal tensors alone.
        """
        layers = {name: layer for layer in (None, *range(model.layers)) for name in model.names(layer)}

        def read(tensor: str) -> torch.Tensor:
            if layers[tensor] != self._layer:
                self._layer, self._held = layers[tensor], {}
            key = contents[tensor]
            if key not in self._held:
                self._held[key] = model.read(tensor)
            return self._held[key]

        def rows(table: str, ids: list[int]) -> torch.Tensor:
            return read(table)[ids].float() if table == _EMBEDDINGS else model.rows(table, ids)

        return replace(model, read=read, rows=rows)


def planned_model(plan: MergePlan, routers: Routers, name: str, reads: LayerReads) -> Runnable:
    """Make the model that a plan would write, whose tensors are made while they are read.

    Args:
        plan: the plan.
        routers: its routers.
        name: what messages call the model.
        reads: reads its tensors.
    """
    made = router_bands(plan, routers)
    table = planned_table(plan, _SEED, made)
    stored = StoredMixture(plan.family, plan.output_config, table, plan.config.expert_names)
    model = replace(as_model(stored, plan.base_folder).runnable, name=name)
    contents = {
        tensor: (output.shape, plan.dtype, *_contents(tensor, made.get(tensor, output.bands)))
        for tensor, output in plan.outputs.items()
    }
    return reads.reading(model, contents)


def _contents(name: str, bands: tuple[Band, ...]) -> tuple[Hashable, ...]:
    """What the bytes of a tensor's bands depend on; noise depends on the tensor's name, too."""
    noisy = any(piece.noise_scale for band in bands for piece in band)
    return (name if noisy else "", *(tuple(map(_content, band)) for band in bands))


def _content(piece: Piece) -> Hashable:
    source = piece.source
    from_where: Hashable = source
    if isinstance(source, TensorInfo):
        from_where = (_identity(source.path), source.start, source.nbytes, source.dtype)
    changes = (piece.scale, piece.noise_scale, piece.head_rows, piece.into_pairs)
    return from_where, piece.dtype, piece.shape, changes


def _identity(file: File) -> str:
    return str(file) if isinstance(file, Path) else file.identity
