"""Carry out an edit: into a folder, or in the mixture's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint.changed_shards import ChangedShards
from moemerge.checkpoint.pieces import Band
from moemerge.dtypes import ComputeDtype
from moemerge.editing.in_place import changed_shards, edit_in_place
from moemerge.editing.plan import EditPlan
from moemerge.editing.writing import write_edit
from moemerge.planning.options import DEFAULT_MAX_SHARD_BYTES
from moemerge.progress import Progress

if TYPE_CHECKING:
    from moemerge.editing.added_routers import AddedReport


@dataclass(frozen=True)
class EditOptions:
    """Options of `edit` beside its plan."""

    overwrite: bool = False
    """Whether to replace a model that is there."""
    seed: int = 0
    """Seed of random rows, `noise_scale` and the choice of documents."""
    device: str = "auto"
    """Device that runs the mixture for new router rows: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    compute_dtype: ComputeDtype = "auto"
    """What the mixture is run in: `float32`, `bfloat16`, or `auto`, which is the faster one on a CPU."""
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    """Upper bound of the tensor data in a new file of an edit in place; other edits take it from their plan."""


def edit(
    plan: EditPlan,
    out: Path | str | None,
    options: EditOptions = EditOptions(),
    *,
    changed: ChangedShards | None = None,
    progress: Progress = lambda _task, _done, _total: None,
) -> "tuple[AddedReport, ...]":
    """Carry out the plan of an edit; the result is complete when this returns, and nothing changed when it raises.

    Args:
        plan: the plan, from `plan_edit`.
        out: the folder to write; None to change the mixture's own, which keeps what is replaced until it is made final
            (`moemerge edit MODEL --commit`).
        options: the options of the edit.
        changed: the shards of an edit in place, from `changed_shards`, where they are known already.
        progress: called as the work goes on; see `Progress`.

    Returns:
        What the router rows of each new expert do with text that they were not fitted to.

    Raises:
        RefusedError: something would be lost, or text of a new expert is not there.
        OutputError: the disk is full or cannot be written.
        RouterError: router rows cannot be computed.
        CheckpointError: a source is not what its header said.
    """
    rows = _Rows(plan, options, progress)
    if out is None:
        shards = changed or changed_shards(plan, options.max_shard_bytes)
        edit_in_place(plan, shards, rows.bands, seed=options.seed, progress=progress)
    else:
        write_edit(plan, Path(out), rows.bands, overwrite=options.overwrite, seed=options.seed, progress=progress)
    return rows.report


class _Rows:
    """The router rows of an edit that are computed; torch is imported when they are asked for."""

    def __init__(self, plan: EditPlan, options: EditOptions, progress: Progress) -> None:
        self._plan, self._options, self._progress = plan, options, progress
        self.report: tuple[AddedReport, ...] = ()

    def bands(self) -> Mapping[str, tuple[Band, ...]]:
        """Compute the routers, by name."""
        from moemerge.editing.routers import RowMaker

        options = self._options
        maker = RowMaker(self._plan, options.device, options.compute_dtype, seed=options.seed, progress=self._progress)
        made = maker.bands()
        self.report = maker.report
        return made
