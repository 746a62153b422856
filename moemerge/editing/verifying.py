"""Verify that an edited mixture holds what its plan says: every byte that is not of computed router rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moemerge.checkpoint.compare import compare_files
from moemerge.checks.files import ABSENT, Difference, compare_entries
from moemerge.checks.verification import Verification, verify_tensors
from moemerge.editing.plan import EditPlan
from moemerge.errors import RefusedError
from moemerge.sources.model_folder import ModelFolder, open_merged


def verify_edit(
    plan: EditPlan,
    out: Path | str,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verification:
    """Compare an edited mixture with its plan, in bounded memory; nothing is written.

    Args:
        plan: the plan, from `plan_edit`.
        out: the folder of the edited mixture.
        seed: the seed of the edit, for `noise_scale`.
        progress: called with the bytes compared and all there are.

    Raises:
        RefusedError: the mixture was edited in place.
        SourceError: `out` is no folder with a checkpoint.
        CheckpointError: a file cannot be read, or a source differs from its header.
    """
    model = open_merged(out, in_stores=True)
    if model.folder == plan.folder.folder:
        raise RefusedError(
            f"{out}: was edited in place, so there is nothing left that it could be compared with. `moemerge inspect "
            f"{out} --values` says whether its files agree, and reads every number."
        )
    files, differences = _compare_copies(plan, model)
    differences += compare_entries(_entries(plan.output_config), _entries(model.config))
    found = verify_tensors(plan.outputs, {spec.name: spec.dtype for spec in plan.specs}, model, seed, progress)
    return replace(found, files=files, differences=(*differences, *found.differences))


def _entries(config: Any) -> dict[str, str]:
    return {f"config.json: {key}": json.dumps(value, sort_keys=True) for key, value in config.items()}


def _compare_copies(plan: EditPlan, model: ModelFolder) -> tuple[int, list[Difference]]:
    """Compare the files that are copied beside weights; returns how many are equal, and the differences."""
    differences = []
    for name, source in plan.base_files.copied.items():
        file = model.file(name)
        found = (compare_files(source, file) if file else ABSENT) or ""
        if found:
            differences.append(Difference(name, f"the bytes of {source}", found))
    return len(plan.base_files.copied) - len(differences), differences
