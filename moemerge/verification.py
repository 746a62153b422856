"""Whether a merged checkpoint holds what its plan says: every byte that does not come from prompts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.compare import compare_files, compare_tensor
from moemerge.checkpoint.copy import Report
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.index import SAFETENSORS_INDEX, read_json
from moemerge.checkpoint.jobs import Jobs
from moemerge.checkpoint.pieces import Fill, Piece, piece_at
from moemerge.checkpoint.values import Census, look_at
from moemerge.dtypes import STORED
from moemerge.errors import CheckpointError, RefusedError, SourceError
from moemerge.plan import Computed, MergePlan, Output
from moemerge.sources import ModelFolder, open_model, read_tensor_table
from moemerge.tokenizer_files import COPIED_FILES, template_names
from moemerge.tokenizer_proof import prove_tokenizer

_ABSENT: Final = "absent"


@dataclass(frozen=True, slots=True)
class Difference:
    """Something in a merged checkpoint that is not as planned."""

    what: str
    """A tensor, a file, or a key of `config.json`."""
    expected: str
    found: str


@dataclass(frozen=True)
class Verification:
    """What was found equal to the plan, and what was not."""

    copied: int
    """Tensors whose bytes are their source's, all of them finite numbers."""
    copied_bytes: int
    converted: int
    """Tensors whose bytes are those that were computed again from their source, or constant, and finite too."""
    converted_bytes: int
    routers: int
    """With the planned shape and dtype, and finite; their values are not computed again."""
    files: int
    """Copied from the base, or made of its tokenizer, byte for byte."""
    differences: tuple[Difference, ...]


def open_merged(out: Path | str) -> ModelFolder:
    """The merged checkpoint in a folder, never one on the Hub.

    Raises:
        SourceError: there is no such folder, or no checkpoint in it.
        CheckpointError: its `config.json` is damaged.
    """
    if not Path(out).is_dir():
        raise SourceError(f"{out}: there is no such folder. Name the folder that holds the merged model.")
    return open_model(str(Path(out).resolve()), lambda _: None)


def verify_merge(
    plan: MergePlan,
    out: Path | str,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verification:
    """Compare a merged checkpoint with its plan, in bounded memory; nothing is written.

    In which shard a tensor lies does not matter.

    Args:
        plan: from `plan_merge`.
        out: the folder of the merged checkpoint.
        seed: that the merge had, for `noise_scale`.
        progress: called with the bytes compared and all there are.

    Raises:
        SourceError: `out` is no folder with a checkpoint.
        CheckpointError: a file cannot be read, or a source is not what its header said.
    """
    model = open_merged(out)
    files, file_differences = _compare_other_files(plan, model)
    differences = _compare_config(plan, model) + file_differences
    try:
        tensors = read_tensor_table(model, lambda _: None)
    except CheckpointError as error:
        tensors = {}
        differences.append(Difference("weights", "an index, headers and files that agree", str(error)))
    else:
        if model.file(SAFETENSORS_INDEX):
            odd = "an index, headers and files that agree"
            differences += [Difference("weights", odd, note) for note in model.notes]
        differences += _compare_index(model, tensors) + _compare_tables(plan, tensors)
    unfit = {difference.what for difference in differences}
    fit = [name for name in plan.outputs if name in tensors and name not in unfit]
    done, total = 0, sum(tensors[name].nbytes for name in fit)

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    with Jobs(report) as jobs:
        started = [jobs.start(partial(_compare_output, plan.outputs[name], tensors[name], seed)) for name in fit]
    results = [job.result() for job in started]
    differences += [difference for result in results for difference in result]
    equal = [name for name, result in zip(fit, results, strict=True) if not result]
    routers = [name for name in equal if isinstance(plan.outputs[name].origin, Computed)]
    converted = [name for name in equal if plan.outputs[name].is_converted]
    copied = sorted(set(equal).difference(routers, converted))
    return Verification(
        copied=len(copied),
        copied_bytes=sum(tensors[name].nbytes for name in copied),
        converted=len(converted),
        converted_bytes=sum(tensors[name].nbytes for name in converted),
        routers=len(routers),
        files=files,
        differences=tuple(differences),
    )


def _compare_config(plan: MergePlan, model: ModelFolder) -> list[Difference]:
    def texts(config: dict[str, Any]) -> dict[str, str]:
        return {f"config.json: {key}": json.dumps(value, sort_keys=True) for key, value in config.items()}

    return _compare_entries(texts(plan.output_config), texts(model.config))


def _compare_other_files(plan: MergePlan, model: ModelFolder) -> tuple[int, list[Difference]]:
    """Tokenizer and the like, and how many are equal; one that the base lacks changes how the merged model reads text.

    What is made of the base's tokenizer is made again: by another transformers it may be other bytes.
    """
    differences: list[Difference] = []
    made: Mapping[str, bytes] = {}
    try:
        made = prove_tokenizer(plan.base_files, plan.output_config, in_process=False).files
    except RefusedError as error:
        differences.append(Difference("tokenizer", "the base's ids", str(error)))
    equal = 0
    for name in dict.fromkeys([*COPIED_FILES, *plan.copied_files, *made, *template_names(model.folder)]):
        source, file = plan.copied_files.get(name), model.file(name)
        expected = f"the bytes of {source}" if source else _ABSENT
        if name in made:
            expected = f"what transformers {version('transformers')} makes of the tokenizer in {plan.base_folder}"
        if not file:
            found = _ABSENT
        elif name in made:
            found = expected if file.read_bytes() == made[name] else "other bytes"
        else:
            found = (compare_files(source, file) or expected) if source else "a file"
        if found != expected:
            differences.append(Difference(name, expected, found))
        else:
            equal += file is not None
    return equal, differences


def _compare_index(model: ModelFolder, tensors: dict[str, StoredTensor]) -> list[Difference]:
    """What a folder announces beside its weight map, which agrees with the headers once they are read."""
    names = {tensor.path.name for tensor in tensors.values()}
    differences = [
        Difference(path.name, "no weights that the index does not name", "a file that no reader loads")
        for path in sorted(model.folder.glob("*.safetensors"))
        if path.name not in names
    ]
    if index := model.file(SAFETENSORS_INDEX):
        metadata = read_json(index).get("metadata")
        announced = metadata.get("total_size") if isinstance(metadata, dict) else None
        stored = sum(tensor.nbytes for tensor in tensors.values())
        if announced != stored:
            differences.append(Difference(SAFETENSORS_INDEX, f"total_size {stored}", f"total_size {announced}"))
    elif len(names) > 1:
        differences.append(Difference(SAFETENSORS_INDEX, f"an index of {len(names)} files", _ABSENT))
    return differences


def _compare_tables(plan: MergePlan, tensors: dict[str, StoredTensor]) -> list[Difference]:
    return _compare_entries(
        {name: f"{STORED[plan.dtype]} {list(output.shape)}" for name, output in plan.outputs.items()},
        {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()},
    )


def _compare_entries(expected: dict[str, str], found: dict[str, str]) -> list[Difference]:
    return [
        Difference(what, expected.get(what, _ABSENT), found.get(what, _ABSENT))
        for what in dict.fromkeys([*expected, *found])
        if expected.get(what) != found.get(what)
    ]


def _compare_output(output: Output, found: StoredTensor, seed: int, report: Report) -> list[Difference]:
    """What is wrong with a tensor: other bytes than those of the plan, or numbers that are infinite or NaN."""
    if isinstance(output.origin, Computed):
        broken = look_at(found, report).not_finite
        return [Difference(found.name, "finite numbers", broken.told)] if broken else []
    census = Census(found)
    unequal = compare_tensor(output.origin, seed, found, report, look=census.add)
    differences = []
    if unequal:
        differences.append(Difference(found.name, _place(output, unequal.first, seed), str(unequal)))
    if broken := census.not_finite:
        source = "" if unequal else f": so it is in {_place(output, census.first_byte, seed)}"
        differences.append(Difference(found.name, "finite numbers", broken.told + source))
    return differences


def _place(output: Output, byte: int, seed: int) -> str:
    """Where a byte of a tensor comes from."""
    number, piece = piece_at(output.bands, byte)
    place = f"piece {number} of {len(output.pieces)}: " if len(output.pieces) > 1 else ""
    return place + _describe(piece, seed)


def _describe(piece: Piece, seed: int) -> str:
    """Where the bytes of a piece should come from, and how they change on the way."""
    source = piece.source
    if not isinstance(source, StoredTensor):
        return f"the number {source.value:g}" if isinstance(source, Fill) else "bytes of the plan"
    changes = [f"as {piece.dtype}"] if piece.dtype != source.dtype else []
    changes += [f"with noise of {piece.noise_scale:g} and seed {seed}"] if piece.noise_scale != 0.0 else []
    changes += [f"times {piece.scale:g}"] if piece.scale != 1.0 else []
    changes += [f"even rows of {piece.head_rows} before odd ones"] if piece.head_rows else []
    return ", ".join([f"{source.name} of {source.path}", *changes])
