"""Verify that a merged checkpoint holds what its plan says: every byte that does not come from prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moemerge.checkpoint.compare import compare_tensor
from moemerge.checkpoint.copy import Report
from moemerge.checkpoint.finite import Census, look_at
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.jobs import JobPool
from moemerge.checkpoint.pieces import Fill, Piece, piece_at
from moemerge.checks.files import Difference, compare_entries, compare_files_beside, compare_index, notable
from moemerge.config.loading import load_config
from moemerge.config.schema import CONFIG_COPY, MergeConfig
from moemerge.dtypes import HEADER_DTYPES, HeaderDType
from moemerge.engines import ENGINES
from moemerge.errors import CheckpointError, RefusedError
from moemerge.families.engines import Trouble, facts_of, trouble_of
from moemerge.planning.output import Computed, Output
from moemerge.planning.plan import MergePlan
from moemerge.planning.shared_choice import settle_as
from moemerge.progress import adding_up
from moemerge.sources.model_folder import ModelFolder, open_merged
from moemerge.sources.tensor_tables import read_tensor_table


@dataclass(frozen=True)
class Verification:
    """Counts of what was found equal to the plan, and what was not."""

    copied: int
    """Number of tensors whose bytes are their source's, all of them finite numbers."""
    copied_bytes: int
    converted: int
    """Number of tensors whose bytes are constant or were computed again from their source, and finite too."""
    converted_bytes: int
    routers: int
    """Number of finite routers of the planned shape and dtype; their values are not computed again."""
    files: int
    """Number of files copied from the base, or made of its tokenizer, byte for byte."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """Notes on what may be there or not, and damages nothing."""


def verify_merge(
    plan: MergePlan,
    out: Path | str,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verification:
    """Compare a merged checkpoint with its plan, in bounded memory; nothing is written.

    It does not matter in which shard a tensor lies.

    Args:
        plan: the plan, from `plan_merge`.
        out: the folder of the merged checkpoint.
        seed: the seed of the merge, for `noise_scale`.
        progress: called with the bytes compared and all there are.

    Raises:
        SourceError: `out` is no folder with a checkpoint.
        RefusedError: the config leaves a choice to the merge, and `out` does not say how it was made.
        CheckpointError: a file cannot be read, or a source differs from its header.
    """
    model = open_merged(out, in_stores=True)
    if plan.is_open:
        plan = settle_as(plan, _kept_config(model))
    files, differences = compare_files_beside(plan, model)
    differences += _compare_engine(plan)
    differences, notes = notable(model, differences)
    found = verify_tensors(plan.outputs, dict.fromkeys(plan.outputs, HEADER_DTYPES[plan.dtype]), model, seed, progress)
    return replace(found, files=files, differences=(*differences, *found.differences), notes=tuple(notes))


def verify_tensors(
    outputs: Mapping[str, Output],
    dtypes: Mapping[str, HeaderDType],
    model: ModelFolder,
    seed: int,
    progress: Callable[[int, int], None],
) -> Verification:
    """Compare a checkpoint's tensors with planned ones; files beside them are not looked at.

    Args:
        outputs: the planned tensors by name.
        dtypes: their dtypes, as a safetensors header spells them.
        model: the checkpoint's folder.
        seed: the seed of `noise_scale`.
        progress: called with the bytes compared and all there are.

    Raises:
        CheckpointError: a file cannot be read, or a source differs from its header.
    """
    tensors, differences = _read_tensors(outputs, dtypes, model)
    unfit = {difference.what for difference in differences}
    fit = [name for name in outputs if name in tensors and name not in unfit]
    results = _compare_outputs(outputs, {name: tensors[name] for name in fit}, seed, progress)
    differences += [difference for result in results.values() for difference in result]
    equal = [name for name, result in results.items() if not result]
    routers = [name for name in equal if isinstance(outputs[name].origin, Computed)]
    converted = [name for name in equal if outputs[name].is_converted]
    copied = sorted(set(equal).difference(routers, converted))
    return Verification(
        copied=len(copied),
        copied_bytes=sum(tensors[name].nbytes for name in copied),
        converted=len(converted),
        converted_bytes=sum(tensors[name].nbytes for name in converted),
        routers=len(routers),
        files=0,
        differences=tuple(differences),
        notes=(),
    )


def _kept_config(model: ModelFolder) -> MergeConfig:
    """Read the config that a merged model's folder keeps, which says what `auto` was.

    Raises:
        RefusedError: there is none, or a wrong one.
    """
    path = model.file(CONFIG_COPY)
    if path is None:
        raise RefusedError(
            f"{model.folder}: has no {CONFIG_COPY}, which says what `shared_weights: auto` was: name the method in the "
            "config that the merge is compared with."
        )
    return load_config(path, allow_identical_experts=True)


def _read_tensors(
    outputs: Mapping[str, Output], dtypes: Mapping[str, HeaderDType], model: ModelFolder
) -> tuple[dict[str, TensorInfo], list[Difference]]:
    """Read a checkpoint's tensors by name, none if files do not agree, and how they differ from the plan's."""
    agreeing = "an index, headers and files that agree"
    of_other_files = tuple(model.notes)
    try:
        tensors = read_tensor_table(model, lambda _: None, whole=True)
    except CheckpointError as error:
        return {}, [Difference("weights", agreeing, str(error))]
    notes = model.notes if model.file(SAFETENSORS_INDEX) else ()
    differences = [Difference("weights", agreeing, note) for note in notes if note not in of_other_files]
    return tensors, [*differences, *compare_index(model, tensors), *_compare_tables(outputs, dtypes, tensors)]


def _compare_outputs(
    outputs: Mapping[str, Output],
    tensors: dict[str, TensorInfo],
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, list[Difference]]:
    """Compare the bytes of tensors of the planned shape and dtype with what the plan makes of its sources."""
    with JobPool(adding_up(progress, sum(tensor.nbytes for tensor in tensors.values()))) as jobs:
        started = {
            name: jobs.start(partial(_compare_output, outputs[name], tensor, seed)) for name, tensor in tensors.items()
        }
    return {name: job.result() for name, job in started.items()}


def _compare_engine(plan: MergePlan) -> list[Difference]:
    """Check that the engine in the config reads such a mixture rightly; a plan for another engine may be compared."""
    engine = plan.config.engine
    if engine is None or engine in plan.right_in:
        return []
    family = plan.shape.model_type
    trouble = trouble_of(engine, family, facts_of(plan.base, plan.mixture))
    words = trouble.words if isinstance(trouble, Trouble) else trouble
    name = ENGINES[engine]
    return [Difference("engine", f"a mixture that {name} reads rightly", f"a {family}, with which {name} {words}")]


def _compare_tables(
    outputs: Mapping[str, Output], dtypes: Mapping[str, HeaderDType], tensors: dict[str, TensorInfo]
) -> list[Difference]:
    return compare_entries(
        {name: f"{dtypes[name]} {list(output.shape)}" for name, output in outputs.items()},
        {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()},
    )


def _compare_output(output: Output, found: TensorInfo, seed: int, report: Report) -> list[Difference]:
    """Find what is wrong with a tensor: other bytes than those of the plan, or numbers that are infinite or NaN."""
    if isinstance(output.origin, Computed):
        broken = look_at(found, report).not_finite
        return [Difference(found.name, "finite numbers", broken.description)] if broken else []
    census = Census(found)
    unequal = compare_tensor(output.origin, seed, found, report, look=census.add)
    differences = []
    if unequal:
        differences.append(Difference(found.name, _place(output, unequal.first, seed), str(unequal)))
    if broken := census.not_finite:
        source = "" if unequal else f": so it is in {_place(output, census.first_byte, seed)}"
        differences.append(Difference(found.name, "finite numbers", broken.description + source))
    return differences


def _place(output: Output, byte: int, seed: int) -> str:
    """Say where a byte of a tensor comes from."""
    number, piece = piece_at(output.bands, byte)
    place = f"piece {number} of {len(output.pieces)}: " if len(output.pieces) > 1 else ""
    return place + _describe(piece, seed)


def _describe(piece: Piece, seed: int) -> str:
    """Say where the bytes of a piece should come from, and how they change on the way."""
    source = piece.source
    if not isinstance(source, TensorInfo):
        return f"the number {source.value:g}" if isinstance(source, Fill) else "bytes of the plan"
    changes = [f"as {piece.dtype}"] if piece.dtype != source.dtype else []
    changes += [f"with noise of {piece.noise_scale:g} and seed {seed}"] if piece.noise_scale != 0.0 else []
    changes += [f"times {piece.scale:g}"] if piece.scale != 1.0 else []
    first = f"the first {piece.rotated_rows} of " if piece.rotated_rows else ""
    changes += [f"even rows of {first}{piece.head_rows} before odd ones"] if piece.head_rows else []
    return ", ".join([f"{source.name} of {source.path}", *changes])
