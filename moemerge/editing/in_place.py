"""Carry out an edit in the mixture's own folder: only shards that change are written, and old ones can come back."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from moemerge.checkpoint.changed_shards import ChangedShards, StoredTensors, lay_out_changes
from moemerge.checkpoint.in_place import changing, check_changeable, replace_model
from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config.config_copy import text_for
from moemerge.config.schema import CARD, CONFIG_COPY
from moemerge.editing.lineage import config_after
from moemerge.editing.plan import EditPlan
from moemerge.editing.writing import write_card
from moemerge.errors import RefusedError
from moemerge.model_card.card import is_foreign_card
from moemerge.planning.options import DEFAULT_MAX_SHARD_BYTES
from moemerge.planning.output import Computed
from moemerge.progress import Progress, Task, adding_up
from moemerge.sources.local import is_snapshot
from moemerge.sources.reference import Reference
from moemerge.sources.tensor_tables import read_tensor_table


def changed_shards(plan: EditPlan, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> ChangedShards:
    """Decide which shards of a mixture stay when it is edited in place.

    Args:
        plan: the plan, from `plan_edit`.
        max_shard_bytes: upper bound of the tensor data in a new file; one that replaces an old file may be as large.

    Raises:
        RefusedError: the mixture is no folder on this machine that is its own, or all its experts change.
        OutputError: its files cannot be replaced, or the disk has too little space.
    """
    folder = plan.folder
    if not isinstance(folder.origin, Path):
        where = "on the Hub" if isinstance(folder.origin, Reference) else "in an object store"
        raise RefusedError(f"{folder.reference}: is {where}, so it cannot be edited in place. Write to another folder.")
    if is_snapshot(folder.folder):
        raise RefusedError(
            f"{folder.reference}: belongs to the Hub's cache, which other programs read, so it is not edited in place. "
            "Write to another folder."
        )
    if folder.whole:
        raise RefusedError(
            f"{folder.reference}: is a multimodal model, and only its text model is edited. Write to another folder."
        )
    if folder.adapters:
        raise RefusedError(
            f"{folder.reference}: an adapter changes weights all over the mixture, so it is not merged in place. Write "
            "to another folder."
        )
    asked = {"granularity": plan.config.granularity > 1, "expert_width": plan.config.expert_width is not None}
    if keys := [key for key, is_asked in asked.items() if is_asked]:
        raise RefusedError(f"{keys[0]}: changes every expert, so that none stays in place. Write to another folder.")
    tensors = read_tensor_table(folder, lambda _: None)
    if any(tensor.path.name.endswith(".bin") for tensor in tensors.values()):
        raise RefusedError(
            f"{folder.reference}: its weights are pickles, which are not edited in place. Write to a folder."
        )
    found = lay_out_changes(
        StoredTensors(folder.folder, tensors),
        plan.specs,
        {name: output.bands for name, output in plan.outputs.items() if output.bands},
        last=plan.mixture.routers,
        max_shard_bytes=max_shard_bytes,
    )
    check_changeable(folder.folder, found.needed_bytes)
    return found


def notes_in_place(plan: EditPlan) -> tuple[str, ...]:
    """Notes on an edit in place, beside the plan's."""
    if not is_foreign_card(plan.folder.folder):
        return ()
    return (f"{CARD}: was not written by moemerge, so it stays as it is; what it says of the experts may change",)


def edit_in_place(
    plan: EditPlan,
    shards: ChangedShards,
    routers: Callable[[], Mapping[str, tuple[Band, ...]]],
    *,
    seed: int = 0,
    progress: Progress = lambda _task, _done, _total: None,
) -> None:
    """Change a mixture in its folder; what is replaced is kept until `checkpoint.in_place.commit`.

    Args:
        plan: the plan, from `plan_edit`.
        shards: the shards, from `changed_shards`.
        routers: called while bytes are copied for the routers that are computed, by name.
        seed: the seed of `noise_scale`.
        progress: called as the work goes on.

    Raises:
        RefusedError: the last change has not been made final.
        OutputError: the disk is full or cannot be written.
        CheckpointError: a source is not what its header said.
    """
    model, written = plan.folder.folder, {name for shard in shards.written for name in shard.starts}
    report = adding_up(partial(progress, Task("weights")), sum(shard.tensor_bytes for shard in shards.written))
    plan.origins.check("since the plan was made")
    with changing(model, shards.needed_bytes) as stage:
        with ShardWriter(stage, shards.written, report, seed=seed, reserve=not shards.shared_bytes) as writer:
            writer.add(
                {
                    name: o.origin
                    for name, o in plan.outputs.items()
                    if not isinstance(o.origin, Computed) and name in written
                }
            )
            if plan.computed:
                writer.add(routers())
            removed = [*shards.removed, *_write_small_files(plan, shards, stage)]  # while bytes are copied
        plan.origins.check("while it was read")
        replace_model(model, removed)


def _write_small_files(plan: EditPlan, shards: ChangedShards, stage: Path) -> list[str]:
    """Write index, config, its copy and the card, unless that is the user's.

    Returns:
        The name of an index that the model no longer has.
    """
    model = plan.folder.folder
    text = text_for(config_after(plan), model)
    (stage / CONFIG_COPY).write_text(text, encoding="utf-8")
    if not is_foreign_card(model):
        write_card(plan, stage, model, text)
    (stage / "config.json").write_text(json.dumps(plan.output_config, indent=2) + "\n", encoding="utf-8")
    if not (shards.written or shards.removed):
        return []
    if (index := shards.index) is not None:
        (stage / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
    return [SAFETENSORS_INDEX] if index is None and (model / SAFETENSORS_INDEX).exists() else []
