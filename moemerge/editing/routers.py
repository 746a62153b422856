"""Routers of an edited mixture, of which some rows are computed."""

from collections.abc import Mapping

import numpy as np

from moemerge.checkpoint.numbers import stored_bytes
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.dtypes import CONFIG_DTYPES, ComputeDtype
from moemerge.editing.plan import EditPlan
from moemerge.errors import RefusedError
from moemerge.progress import Progress
from moemerge.routers.random import DRAWS
from moemerge.routers.rows import Rows


class RowMaker:
    """Makes the router rows of an edit that are not kept."""

    def __init__(
        self, plan: EditPlan, device: str, compute_dtype: ComputeDtype, *, seed: int, progress: Progress
    ) -> None:
        """Prepare the work.

        Args:
            plan: the plan.
            device: the device that runs the mixture.
            compute_dtype: what it is run in.
            seed: seed of random rows.
            progress: called as layers are done.
        """
        self._plan, self._device, self._dtype, self._seed, self._progress = plan, device, compute_dtype, seed, progress

    def bands(self) -> Mapping[str, tuple[Band, ...]]:
        """Compute the rows; returns the routers by name.

        Raises:
            RefusedError: the config's gate_mode makes no rows for a mixture.
        """
        made = self._rows()
        found: dict[str, tuple[Band, ...]] = {}
        for name, computed in self._plan.computed.items():
            dtype = self._plan.mixture.router(computed.layer).dtype
            found[name] = ((Piece(stored_bytes(made[computed.layer], CONFIG_DTYPES[dtype]), dtype),),)
        return found

    def _rows(self) -> Mapping[int, Rows]:
        """Rows (expert, hidden) of each layer, all drawn anew."""
        mixture, mode = self._plan.mixture, self._plan.config.gate_mode
        if mode not in DRAWS:
            raise RefusedError(
                f"gate_mode: {mode} makes no routers of a mixture. Leave the key out, and kept rows stay, "
                f"or choose {' or '.join(DRAWS)}."
            )
        shape = (len(mixture.moe_layers), len(self._plan.slots), mixture.hidden)
        drawn = DRAWS[mode](np.random.default_rng(self._seed), shape)
        return dict(zip(mixture.moe_layers, drawn, strict=True))
