"""Routers of an edited mixture, of which some rows are computed."""

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np
import torch

from moemerge.checkpoint.pieces import Band
from moemerge.config.router_methods import AUTO
from moemerge.dtypes import ComputeDtype
from moemerge.editing.added_routers import AddedExperts, AddedReport, EditedExpert, added_rows
from moemerge.editing.kept_routers import joined_rows, stored_rows
from moemerge.editing.plan import EditPlan
from moemerge.editing.preview import preview, router_bands
from moemerge.editing.router_inputs import RowPass
from moemerge.editing.slots import Added, Foreign, Kept
from moemerge.editing.texts import described, documents_of
from moemerge.errors import MoemergeError, RefusedError
from moemerge.evaluation.runnable import as_model
from moemerge.families.dense import DenseModel, ModelTensors, read_dense
from moemerge.progress import Progress
from moemerge.routers.random import DRAWS
from moemerge.routers.rows import Rows
from moemerge.sources.model_folder import ModelFolder, open_model
from moemerge.sources.stored_mixtures import is_mixture, kept_config
from moemerge.sources.tensor_tables import read_tensor_tables

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
        self._mixture = as_model(plan.mixture, plan.folder.folder)
        unmade = np.zeros((len(plan.slots), plan.mixture.hidden), np.float32)
        self._pass = RowPass(
            preview(self._mixture, plan, dict.fromkeys(plan.mixture.moe_layers, unmade), seed),
            device,
            compute_dtype,
            progress,
            plan.config.granularity,
            settings.tokens_per_expert,
            self._seed,
            settings.chat_roles,
        )
        before = kept_config(plan.folder, lambda _: None)
        self._documents = documents_of(described(plan.config, plan.slots, before), plan.slots)
        self.report: tuple[AddedReport, ...] = ()
        """What the rows of new experts do with text that they were not fitted to."""

    def bands(self) -> Mapping[str, tuple[Band, ...]]:
        """Compute the rows; returns the routers by name.

        Raises:
            RefusedError: the rows were fitted by `moemerge prune`, or there is no such device.
            RouterError: the mixture's tokenizer cannot be used.
            CheckpointError: the mixture's numbers are not finite.
        """
        if self._plan.config.router.fitted:
            raise RefusedError(
                "router.fitted: the router rows of this mixture were fitted to text by `moemerge prune`, which this "
                "config cannot do again. Prune again, or remove the key, and rows stay as they were before."
            )
        return router_bands(self._plan, self._rows() if self._plan.config.gate_mode == AUTO else self._drawn())

    def _drawn(self) -> dict[int, Rows]:
        """Rows (expert, hidden) of each layer, all drawn anew."""
        mixture = self._plan.mixture
        shape = (len(mixture.moe_layers), len(self._plan.slots), mixture.hidden)
        drawn = DRAWS[self._plan.config.gate_mode](np.random.default_rng(self._seed), shape)
        return dict(zip(mixture.moe_layers, drawn, strict=True))

    def _rows(self) -> dict[int, Rows]:
        """Rows (expert, hidden) of each layer: those of kept experts, and fitted ones beside them."""
        plan, mixture = self._plan, self._plan.mixture
        stored = [slot for slot in plan.slots if not isinstance(slot, Added)]
        if len(stored) < len(plan.slots):
            return self._added()
        known: dict[int, Rows] = {
            layer: np.concatenate([self._stored(slot, layer) for slot in stored]) for layer in mixture.moe_layers
        }
        foreign = [number for number, slot in enumerate(plan.slots) if isinstance(slot, Foreign)]
        own = [number for number in range(len(plan.slots)) if number not in foreign]
        if all(self._documents[number] for number in foreign) and any(self._documents[number] for number in own):
            return {**known, **self._added()}  # no text enters layers that predict further tokens
        documents = tuple([text for number in part for text in self._documents[number]] for part in (own, foreign))
        if not all(documents):
            return known
        moved = joined_rows(self._pass, known, foreign, (documents[0], documents[1]), mixture.choosing.scoring)
        return {**known, **moved}

    def _stored(self, slot: Kept | Foreign, layer: int) -> Rows:
        """The row (1, hidden) that an expert of a mixture has there."""
        if isinstance(slot, Foreign):
            return stored_rows(slot.other, layer, [slot.number])
        return stored_rows(self._plan.mixture, layer, [slot.numbers[layer]])

    def _added(self) -> dict[int, Rows]:
        """Rows (expert, hidden) of each layer, of which those of new experts are fitted."""
        plan = self._plan
        request = AddedExperts(
            mixture=self._mixture,
            experts=tuple(map(self._expert, range(len(plan.slots)))),
            experts_per_token=plan.config.experts_per_token,
            base=trained_from(plan.folder),
            lambda_=plan.config.router.lambda_,
        )
        made = added_rows(request, self._pass)
        self.report = made.report
        return dict(made.rows)

    def _expert(self, number: int) -> EditedExpert:
        slot = self._plan.slots[number]
        name, documents = self._plan.config.expert_names[number], self._documents[number]
        numbers = slot.numbers if isinstance(slot, Kept) else {}
        ffn = partial(slot.projection, self._plan.mixture)
        if isinstance(slot, Foreign) and not documents:
            return EditedExpert(name, ffn, row=lambda layer: torch.from_numpy(self._stored(slot, layer)[0]))
        return EditedExpert(name, ffn, documents, numbers)


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
