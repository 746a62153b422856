"""Carry out an edit: the edited mixture in a folder of its own."""

import json
from collections.abc import Callable, Mapping
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
from moemerge.merging.overwriting import replaceable_files
from moemerge.planning.output import Computed
from moemerge.progress import Progress, Task

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
    check_space(out, plan.output_bytes, left=left_bytes(out))
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
    done, total = 0, sum(shard.nbytes - len(shard.header) for shard in plan.shards)

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(Task("weights"), done, total)

    threads = CONNECTIONS if plan.download_bytes else MAX_THREADS
    with staged(out, plan.folders, inputs=plan.inputs, replaceable=replaceable) as stage:
        with ShardWriter(stage, plan.shards, report, seed=seed, threads=threads) as writer:
            writer.add({name: o.origin for name, o in plan.outputs.items() if not isinstance(o.origin, Computed)})
            if plan.computed:
                writer.add(routers())
        write_other_files(plan, stage, out)
        plan.origins.check("while it was read")
        (stage / "config.json").write_text(json.dumps(plan.output_config, indent=2) + "\n", encoding="utf-8")


def write_other_files(plan: EditPlan, folder: Path, final: Path) -> None:
    """Write all files but weights and `config.json` into a folder that will be called `final`."""
    for name, path in plan.base_files.copied.items():
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(path, folder / name)
    if (index := plan.index) is not None:
        (folder / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
    (folder / CONFIG_COPY).write_text(text_for(plan.config, final), encoding="utf-8")
