"""Find what a checkpoint is, and whether index, headers and sizes agree, from headers alone; on request its numbers."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.files import size_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX, SINGLE_SAFETENSORS, read_json
from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS, JobPool
from moemerge.checkpoint.packed import notes_on
from moemerge.checkpoint.unreadable import reasons
from moemerge.checkpoint.values import Census, NotFinite, has_floats, look_at
from moemerge.sources.model_folder import open_model, read_tensor_table

_NUMBERED_EXPERT: Final = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_STACKED_EXPERTS: Final = re.compile(r"(?:^|\.)experts\.|block_sparse_moe\.(?:input|output)_linear\.")
_EXPERT_COUNT_KEYS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN_KEYS: Final = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
_LISTED: Final = 4
_EXPERT_AXES: Final = 3  # stacked experts: (expert, out, in)
_MATRIX_AXES: Final = 2


@dataclass(frozen=True)
class Values:
    """A summary of all numbers of a checkpoint."""

    tensors: int
    """Number of tensors that were read."""
    not_finite: tuple[NotFinite, ...]
    """Tensors with infinite or NaN numbers: the model is damaged."""
    zeros: tuple[str, ...]
    """Matrices that hold nothing but zeros."""
    skipped: dict[str, int]
    """Number of tensors that were not read, by dtype: those that hold no floats, such as quantised weights."""

    @property
    def remarks(self) -> list[str]:
        """Remarks in words on what may be intended, and on what was left out."""
        found = []
        if self.zeros:
            more = f" and {len(self.zeros) - 1} more matrices hold" if len(self.zeros) > 1 else " holds"
            found.append(
                f"{self.zeros[0]}{more} nothing but zeros: so do weights that are switched off, and files that were "
                "not downloaded whole"
            )
        if self.skipped:
            kinds = ", ".join(f"{count} of {dtype}" for dtype, count in self.skipped.items())
            found.append(f"tensors that are no floats, such as quantised weights, were not looked at: {kinds}")
        return found


@dataclass(frozen=True)
class Inspection:
    """A summary of a checkpoint."""

    reference: str
    model_type: str
    layers: int | None
    experts: int
    """Number of experts; 0 for a dense model."""
    experts_per_token: int | None
    total_parameters: int
    active_parameters: int
    tensors: int
    files: dict[str, int]
    """Map from file name to size in bytes."""
    dtype_bytes: dict[str, int]
    """Map from stored dtype to bytes of tensors."""
    warnings: tuple[str, ...]
    """Warnings of what does not stop a reader but looks wrong."""
    values: Values | None
    """The summary of all numbers; None where it was not asked for."""


def inspect_checkpoint(
    reference: str,
    announce: Callable[[str], None] = lambda _: None,
    *,
    values: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Read a model folder's config, index and headers, and check them against each other.

    Args:
        reference: the model's reference.
        announce: called with a line about each step that takes long.
        values: whether to read every number, too, in bounded memory.
        progress: called while numbers are read, with the bytes read and all there are.

    Raises:
        SourceError: there is no such model.
        CheckpointError: the index, the headers and the files do not agree.
    """
    model = open_model(reference, announce)
    tensors = read_tensor_table(model, announce, weights="stream")
    stored_tensors = {leaf for tensor in tensors.values() for leaf in leaves(tensor)}
    files = {path.name: size_of(path) for path in {tensor.path for tensor in stored_tensors}}
    per_token = next((model.config[key] for key in _PER_TOKEN_KEYS if key in model.config), None)
    if isinstance(per_token, list):  # by layer
        per_token = max(per_token, default=None)
    experts = _count_experts(tensors)
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    in_experts = sum(math.prod(tensor.shape) for tensor in tensors.values() if _is_expert(tensor))
    idle = (experts - per_token) / experts if experts and isinstance(per_token, int) else 0
    dtype_bytes: Counter[str] = Counter()
    for tensor in stored_tensors:
        dtype_bytes[tensor.dtype] += tensor.nbytes
    warnings = [note.removeprefix(f"{reference}: ") for note in model.notes]
    claimed = next((model.config[key] for key in _EXPERT_COUNT_KEYS if key in model.config), 0)
    if experts != claimed:
        warnings.append(f"config.json announces {claimed} experts, the tensors hold {experts}")
    index = model.file(SAFETENSORS_INDEX)
    stale = sorted(
        path.name
        for path in model.folder.glob("*.safetensors")
        if path.name not in files and path.name.startswith("model")
    )
    if stale and not (index and SINGLE_SAFETENSORS in files):  # which a note speaks of
        warnings.append(f"{', '.join(stale)}: not in the index, so no reader loads it")
    lost = [f"{name} {reason}" for name, reason in reasons(tensors).items()]
    warnings += [*lost[:_LISTED], *([f"{len(lost) - _LISTED} more such tensors"] if lost[_LISTED:] else [])]
    warnings += notes_on(tensors)
    metadata = read_json(index).get("metadata") if index else None
    announced = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = sum(dtype_bytes.values())
    if announced is not None and announced != stored and not model.adapters:
        warnings.append(f"{SAFETENSORS_INDEX} announces {announced} bytes of tensors, the headers {stored}")
    looked = _look_at_all(stored_tensors, progress) if values else None
    return Inspection(
        reference=reference,
        model_type=str(model.config.get("model_type")),
        layers=model.config.get("num_hidden_layers"),
        experts=experts,
        experts_per_token=per_token if experts else None,
        total_parameters=total,
        active_parameters=total - round(in_experts * idle),
        tensors=len(tensors),
        files=dict(sorted(files.items())),
        dtype_bytes=dict(dtype_bytes),
        warnings=tuple(warnings),
        values=looked,
    )


def _look_at_all(tensors: Collection[TensorInfo], progress: Callable[[int, int], None]) -> Values:
    """Look at every number of some tensors, in the order of their bytes in each file."""
    ordered = sorted(tensors, key=lambda tensor: (str(tensor.path), tensor.start, tensor.name))
    floats = [tensor for tensor in ordered if has_floats(tensor.dtype)]
    done, total = 0, sum(tensor.nbytes for tensor in floats)

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    here = all(isinstance(tensor.path, Path) for tensor in floats)
    with JobPool(report, MAX_THREADS if here else CONNECTIONS) as jobs:
        started = [jobs.start(partial(look_at, tensor)) for tensor in floats]
    looked: list[Census] = [job.result() for job in started]
    return Values(
        tensors=len(floats),
        not_finite=tuple(found for census in looked if (found := census.not_finite)),
        zeros=tuple(
            tensor.name
            for tensor, census in zip(floats, looked, strict=True)
            if census.only_zeros and len(tensor.shape) >= _MATRIX_AXES
        ),
        skipped=dict(sorted(Counter(tensor.dtype for tensor in ordered if not has_floats(tensor.dtype)).items())),
    )


def _is_expert(tensor: TensorInfo) -> bool:
    stacked = _STACKED_EXPERTS.search(tensor.name) and len(tensor.shape) == _EXPERT_AXES
    return bool(stacked or _NUMBERED_EXPERT.search(tensor.name))


def _count_experts(tensors: dict[str, TensorInfo]) -> int:
    numbers = {int(match[1]) for name in tensors if (match := _NUMBERED_EXPERT.search(name))}
    stacked = {tensor.shape[0] for tensor in tensors.values() if _is_expert(tensor)} if not numbers else set()
    return len(numbers) or max(stacked, default=0)
