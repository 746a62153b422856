"""Checks, before anything is written, that a merge can be written to its folder, and loses no files there."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TypedDict

from moemerge.checkpoint.output_folder import Replaceable, check_limits, check_scratch, check_space, check_target
from moemerge.checkpoint.staging import left_bytes
from moemerge.merging.overwriting import replaceable_files
from moemerge.planning.plan import MergePlan


def check_output(plan: MergePlan, out: Path | str, *, overwrite: bool = False, made_bytes: int = 0) -> None:
    """Refuse a folder that `merge` could not write, or would remove files from; leaves nothing on the disk.

    Args:
        plan: the plan to carry out.
        out: the folder to write.
        overwrite: whether a model that is there may be replaced.
        made_bytes: bytes of files that the plan does not count.

    Raises:
        RefusedError: see `merge`.
        OutputError: see `merge`.
    """
    out = Path(out)
    check_target(out, plan.folders, **replacing(plan, overwrite=overwrite))
    check_space(out, plan.output_bytes + made_bytes - plan.shared_bytes + plan.kept_bytes, left=left_bytes(out))
    check_limits(out, largest=max(shard.nbytes for shard in plan.shards), memory=plan.peak_memory_bytes)


def check_streaming(plan: MergePlan, scratch: Path | str) -> None:
    """Refuse a folder beside which a merge to the Hub could not write two shards; nothing is left on the disk.

    Raises:
        RefusedError: see `merge`.
        OutputError: see `merge`.
    """
    scratch = Path(scratch)
    check_scratch(scratch, plan.folders)
    two_shards = sorted(shard.nbytes for shard in plan.shards)[-2:]
    check_space(scratch, plan.kept_bytes + sum(two_shards), left=left_bytes(scratch))
    check_limits(scratch, largest=two_shards[-1], memory=plan.peak_memory_bytes)


class Replacing(TypedDict, total=False):
    """Arguments of `check_target` and `staged`."""

    inputs: Collection[Path]
    replaceable: Replaceable


def replacing(plan: MergePlan, *, overwrite: bool) -> Replacing:
    """Arguments of `check_target` and `staged` for a merge that may replace a model, none for one that may not."""
    if not overwrite:
        return {}
    return {"inputs": plan.inputs, "replaceable": partial(replaceable_files, written=plan.file_names)}
