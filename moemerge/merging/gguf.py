"""A merge whose output is one GGUF file: the plan's own stream, without a checkpoint in between."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band
from moemerge.checkpoint.shards import Shard
from moemerge.dtypes import HEADER_DTYPES
from moemerge.errors import RefusedError
from moemerge.export.layout import padded_bands
from moemerge.export.model import GgufFormat, GgufModel, asked_type
from moemerge.export.planned_tensors import Planned, waits
from moemerge.export.tensors import GgufTensor
from moemerge.export.writing import STAGED, SpaceCheck, advising_types, check_file, check_room, staged_file
from moemerge.merging.merge_work import Tally, Work, router_bands
from moemerge.merging.options import MergeOptions
from moemerge.planning.plan import MergePlan
from moemerge.progress import Progress

if TYPE_CHECKING:
    from moemerge.routers.report import RoutingReport

# Of the stage: the small files that a checkpoint would have, in a folder with the model's name.
_DESCRIBED: Final = "described"


def merge_to_gguf(
    plan: MergePlan,
    file: Path | str,
    options: MergeOptions = MergeOptions(),
    *,
    form: GgufFormat = GgufFormat(),
    room: SpaceCheck = check_room,
    progress: Progress = lambda _task, _done, _total: None,
    warn: Callable[[str], None] = lambda _: None,
    announce: Callable[[str], None] = lambda _: None,
) -> "RoutingReport":
    """Carry out a plan into a GGUF file, which is complete when this returns, and untouched when it raises.

    It holds what `write_gguf` makes of the checkpoint that `merge` writes into a folder of the file's name without its
    suffix, to the last byte.

    Args:
        plan: the plan, from `plan_merge`.
        file: the file to write.
        options: the options of the merge; nothing is kept for `resume`.
        form: the type of the file's matrices, and the converter that reads a tokenizer that is not known here.
        room: the check that the disk has enough space.
        progress: called as the work goes on; see `Progress`.
        warn: see `merge`.
        announce: see `merge`.

    Returns:
        The routing report: which expert takes which of the prompts' tokens.

    Raises:
        RefusedError: the family or its tokenizer is not written as a GGUF file, the file is there already, or is read
            for the merge; see `merge` for more.
        OutputError, RouterError, CheckpointError: see `merge`.
    """
    file = Path(file)
    plan.origins.check("since the plan was made")
    check_file(file, overwrite=options.overwrite, inputs=plan.inputs, sources=plan.folders)
    model = GgufModel(plan.output_config, asked_type(form.type, {HEADER_DTYPES[plan.dtype]}), form.llama_cpp)
    tensors = model.tensors(planned_table(plan, options.seed, {}))
    room(file, tensors, plan.kept_bytes, plan.peak_memory_bytes)
    work = Work(plan, options, warn, to_folder=False)
    with staged_file(file, overwrite=options.overwrite) as stage, work.sources_kept_in(stage):
        if plan.is_open:
            plan = work.choose(None, progress, announce)
            tensors = model.tensors(planned_table(plan, options.seed, {}))
        work.describe(described := stage / _DESCRIBED / file.stem)
        shard = model.lay_out(tensors, described, stage / STAGED)
        report = _write(work, model, tensors, stage, shard=shard, tally=Tally(progress, [shard]))
        plan.origins.check("while it was read")
    return report


def _write(
    work: Work, model: GgufModel, tensors: Sequence[GgufTensor], stage: Path, *, shard: Shard, tally: Tally
) -> "RoutingReport":
    """Write the tensors without routers while these are computed, then the rest; returns the routing report."""
    plan, options = work.plan, work.options
    # What does not fit into the plan's own dtype is the config's to change.
    advising = nullcontext() if HEADER_DTYPES[plan.dtype] == "F16" else advising_types()
    with advising, work.writer(stage, [shard], tally) as writer:
        ready = [tensor for tensor in tensors if not waits(tensor.bands)]
        writer.add(padded_bands(ready))
        routers = work.init_routers_beside(writer, tally)
        complete = model.tensors(planned_table(plan, options.seed, router_bands(plan, routers)))
        names = {tensor.name for tensor in ready}
        writer.add(padded_bands([tensor for tensor in complete if tensor.name not in names]))
    return routers.report


def planned_table(plan: MergePlan, seed: int, made: Mapping[str, tuple[Band, ...]]) -> dict[str, TensorInfo]:
    """List the tensors of the checkpoint that the plan would write; computed ones have bytes only if in `made`."""
    if plan.shape.vision:
        raise RefusedError("keep_vision: a GGUF file holds the text model alone. Remove the key.")
    dtype = HEADER_DTYPES[plan.dtype]
    return {
        name: Planned(name, dtype, output.shape, made.get(name, output.bands), seed).tensor()
        for name, output in plan.outputs.items()
    }
