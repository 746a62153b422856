"""Carry out an edit: the edited mixture in a folder of its own."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from moemerge.checkpoint.copy import copy_file
from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS
from moemerge.checkpoint.output_folder import check_limits, check_space, check_target
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.staging import left_bytes, staged
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config.config_copy import text_for
from moemerge.config.schema import CONFIG_COPY
from moemerge.editing.plan import EditPlan
from moemerge.errors import RefusedError
from moemerge.merging.overwriting import replaceable_files
from moemerge.model_card.edit_card import EditCard, write_edit_card
from moemerge.model_card.metadata import licence_of
from moemerge.planning.output import Computed
from moemerge.progress import Progress, Task, adding_up

# A pass of the mixture aside, an edit moves bytes.
_MEMORY_BYTES = 300_000_000


def check_edit(plan: EditPlan, out: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that an edit could not write, or would remove files from; leaves nothing on the disk.

    Raises:
        RefusedError: something would be lost.
        OutputError: the folder cannot be written.
    """
    replaceable = partial(replaceable_files, written=plan.file_names) if overwrite else None
    check_target(out, plan.folders, inputs=plan.inputs, replaceable=replaceable)
    check_space(out, plan.output_bytes - plan.shared_bytes, left=left_bytes(out), what="the edited model")
    check_limits(out, largest=max(shard.nbytes for shard in plan.shards), memory=_MEMORY_BYTES)


def write_edit(
    plan: EditPlan,
    out: Path,
    routers: Callable[[], Mapping[str, tuple[Band, ...]]],
    *,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress = lambda _task, _done, _total: None,
) -> None:
    """Write the edited mixture; the folder is complete when this returns, and untouched when it raises.

    Args:
        plan: the plan, from `plan_edit`.
        out: the folder.
        routers: called while bytes are copied for the routers that are computed, by name.
        overwrite: whether to replace a model that is there.
        seed: the seed of `noise_scale`.
        progress: called as the work goes on.

    Raises:
        RefusedError: something would be lost.
        OutputError: the disk is full or cannot be written.
        CheckpointError: a source is not what its header said.
    """
    check_edit(plan, out, overwrite=overwrite)
    plan.origins.check("since the plan was made")
    replaceable = partial(replaceable_files, written=plan.file_names) if overwrite else None
    report = adding_up(partial(progress, Task("weights")), plan.layout.tensor_bytes)
    threads = CONNECTIONS if plan.download_bytes else MAX_THREADS
    with staged(out, plan.folders, inputs=plan.inputs, replaceable=replaceable) as stage:
        reserve = not plan.shared_bytes
        with ShardWriter(stage, plan.shards, report, seed=seed, threads=threads, reserve=reserve) as writer:
            writer.add({name: o.origin for name, o in plan.outputs.items() if not isinstance(o.origin, Computed)})
            if plan.computed:
                writer.add(routers())
            write_other_files(plan, stage, out)  # while bytes are copied
        plan.origins.check("while it was read")
        (stage / "config.json").write_text(json.dumps(plan.output_config, indent=2) + "\n", encoding="utf-8")


def write_other_files(plan: EditPlan, folder: Path, final: Path) -> None:
    """Write all files but weights and `config.json` into a folder that will be called `final`."""
    for name, path in plan.base_files.copied.items():
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(path, folder / name)
    if (index := plan.layout.index) is not None:
        (folder / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
    text = text_for(plan.config, final)
    (folder / CONFIG_COPY).write_text(text, encoding="utf-8")
    write_card(plan, folder, final, text)


def write_card(plan: EditPlan, folder: Path, final: Path, text: str) -> None:
    """Write the model card into a folder that will be called `final`; `text` is the config that it shows."""
    licence = None
    with suppress(RefusedError):  # only who publishes the model has to say
        licence = licence_of(plan.sources)
    write_edit_card(folder, final.resolve().name, _card(plan, text), plan.sources, licence)


def _card(plan: EditPlan, text: str) -> EditCard:
    mixture = plan.mixture
    left_out = f" Left out: {', '.join(plan.dropped)}." if plan.dropped else ""
    return EditCard(
        model_type=mixture.family.model_type,
        what=f"A {mixture.family.model_type} of {plan.experts} experts, {plan.experts_per_token} per token: "
        f"{plan.folder.reference} with {mixture.experts} experts, {mixture.experts_per_token} per token, edited with "
        f"moemerge.{left_out}",
        parameters=(plan.total_parameters, plan.active_parameters),
        rows=plan.origins_of_experts,
        notes=plan.notes,
        text=text.rstrip(),
    )
