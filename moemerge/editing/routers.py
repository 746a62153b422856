"""Routers of an edited mixture, of which some rows are computed."""

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np

from moemerge.checkpoint.numbers import stored_bytes
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.config.router_methods import AUTO
from moemerge.dtypes import CONFIG_DTYPES, ComputeDtype
from moemerge.editing.added_routers import AddedExperts, AddedReport, EditedExpert, added_rows
from moemerge.editing.kept_routers import TextPass, joined_rows, refitted_rows, stored_rows
from moemerge.editing.plan import EditPlan
from moemerge.editing.slots import Foreign, Kept
from moemerge.editing.texts import documents_of
from moemerge.errors import MoemergeError, RefusedError
from moemerge.evaluation.runnable import as_model
from moemerge.families.dense import DenseModel, ModelTensors, read_dense
from moemerge.progress import Progress
from moemerge.routers.random import DRAWS
from moemerge.routers.rows import Rows
from moemerge.sources.model_folder import ModelFolder, open_model, read_tensor_tables
from moemerge.sources.stored_mixtures import is_mixture, kept_config

# Mixtures that were made from mixtures are followed back so far to the model that their experts were trained from.
_MOST_EDITS: Final = 20


class RowMaker:
    """Makes the router rows of an edit that are not kept as they are."""

    def __init__(
        self, plan: EditPlan, device: str, compute_dtype: ComputeDtype, *, seed: int, progress: Progress
    ) -> None:
        """Prepare the work.

        Args:
            plan: the plan.
            device: the device that runs the mixture.
            compute_dtype: what it is run in.
            seed: seed of random rows and of the choice of documents, unless the config has one.
            progress: called as layers are done.

        Raises:
            RefusedError: text that a new expert is to take is not there.
        """
        self._plan, settings = plan, plan.config.router
        self._seed = seed if settings.seed is None else settings.seed
        self._pass = TextPass(
            as_model(plan.mixture, plan.folder.folder),
            device,
            compute_dtype,
            progress,
            settings.tokens_per_expert,
            self._seed,
            settings.chat_roles,
        )
        self._documents = [documents_of(plan.config, number, slot) for number, slot in enumerate(plan.slots)]
        self.report: tuple[AddedReport, ...] = ()
        """What the rows of new experts do with text that they were not fitted to."""

    def bands(self) -> Mapping[str, tuple[Band, ...]]:
        """Compute the rows; returns the routers by name.

        Raises:
            RefusedError: the rows were fitted by `moemerge prune`.
            RouterError: the mixture's tokenizer, or the device, cannot be used.
            CheckpointError: the mixture's numbers are not finite.
        """
        if self._plan.config.router.fitted:
            raise RefusedError(
                "router.fitted: the router rows of this mixture were fitted to text by `moemerge prune`, which this "
                "config cannot do again. Prune again, or remove the key, and rows stay as they were before."
            )
        made = self._rows() if self._plan.config.gate_mode == AUTO else self._drawn()
        found: dict[str, tuple[Band, ...]] = {}
        for name, computed in self._plan.computed.items():
            dtype = self._plan.mixture.router(computed.layer).dtype
            rows = np.repeat(made[computed.layer], self._plan.config.granularity, axis=0)  # parts have equal rows
            found[name] = ((Piece(stored_bytes(rows, CONFIG_DTYPES[dtype]), dtype),),)
        return found

    def _drawn(self) -> dict[int, Rows]:
        """Rows (expert, hidden) of each layer, all drawn anew."""
        mixture = self._plan.mixture
        shape = (len(mixture.moe_layers), len(self._plan.slots), mixture.hidden)
        drawn = DRAWS[self._plan.config.gate_mode](np.random.default_rng(self._seed), shape)
        return dict(zip(mixture.moe_layers, drawn, strict=True))

    def _rows(self) -> dict[int, Rows]:
        """Rows (expert, hidden) of each layer: those of kept experts, and fitted ones beside them."""
        plan = self._plan
        kept = {n: slot for n, slot in enumerate(plan.slots) if isinstance(slot, Kept)}
        rows = {
            layer: stored_rows(plan.mixture, layer, [slot.numbers[layer] for slot in kept.values()])
            for layer in plan.mixture.moe_layers
        }
        if not plan.new:
            return refitted_rows(self._pass, rows, self._documents, plan.config.experts_per_token)
        foreign = {n: slot for n, slot in plan.new.items() if isinstance(slot, Foreign)}
        new = self._joined(rows, kept, foreign) if foreign else self._added()
        placed = {}
        for layer, own in rows.items():
            placed[layer] = np.empty((len(plan.slots), plan.mixture.hidden), np.float32)
            placed[layer][list(kept)] = own
            placed[layer][list(plan.new)] = new[layer]
        return placed

    def _joined(
        self, rows: Mapping[int, Rows], kept: Mapping[int, Kept], foreign: Mapping[int, Foreign]
    ) -> Mapping[int, Rows]:
        """Rows (new expert, hidden) of each layer for experts of another mixture; moved where text says how far."""
        theirs = {
            layer: np.concatenate([stored_rows(slot.other, layer, [slot.number]) for slot in foreign.values()])
            for layer in rows
        }
        documents = tuple([text for n in part for text in self._documents[n]] for part in (kept, foreign))
        if not all(documents):
            return theirs
        return joined_rows(self._pass, rows, theirs, (documents[0], documents[1]))

    def _added(self) -> dict[int, Rows]:
        """Rows (new expert, hidden) of each layer for experts from dense models."""
        plan = self._plan
        order = sorted(plan.new, key=lambda number: not self._documents[number])  # those with text first
        experts = [self._expert(n) for n, slot in enumerate(plan.slots) if isinstance(slot, Kept)]
        request = AddedExperts(
            mixture=self._pass.mixture,
            experts=(*experts, *map(self._expert, order)),
            experts_per_token=plan.config.experts_per_token,
            base=trained_from(plan.folder),
            tokens_per_expert=self._pass.tokens_per_expert,
            lambda_=plan.config.router.lambda_,
            seed=self._seed,
        )
        made = added_rows(request, self._pass.device, self._pass.compute_dtype, self._pass.progress)
        self.report = made.report
        back = [order.index(number) for number in plan.new]
        return {layer: rows[back] for layer, rows in made.rows.items()}

    def _expert(self, number: int) -> EditedExpert:
        slot = self._plan.slots[number]
        name, documents = self._plan.config.expert_names[number], self._documents[number]
        numbers = slot.numbers if isinstance(slot, Kept) else {}
        return EditedExpert(name, partial(slot.projection, self._plan.mixture), documents, numbers)


def trained_from(folder: ModelFolder) -> ModelTensors | None:
    """Find the dense model that a mixture's experts were trained from, as the configs kept in folders name it.

    None where that is not known, or not to be reached.
    """
    for _ in range(_MOST_EDITS):
        config = kept_config(folder, lambda _: None)
        if config is None:
            return None
        try:
            opened = open_model(config.base_model, lambda _: None)
            dense = read_dense(opened.config)
            if isinstance(dense, DenseModel):
                (tensors,) = read_tensor_tables([opened], lambda _: None, weights="stream", dense=True)
                return ModelTensors(dense, tensors)
        except MoemergeError:
            return None
        if not is_mixture(opened) or opened.folder == folder.folder:
            return None
        folder = opened
    return None
