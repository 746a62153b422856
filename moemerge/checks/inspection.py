"""Find what a checkpoint is, and whether index, headers and sizes agree, from headers alone; on request its numbers."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.derived import kinds_of, leaves
from moemerge.checkpoint.files import size_of
from moemerge.checkpoint.finite import Census, NotFinite, has_floats, look_at
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX, SINGLE_SAFETENSORS, read_json
from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS, JobPool
from moemerge.checkpoint.packed import notes_on
from moemerge.checkpoint.unreadable import is_no_tensor, reasons
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.progress import adding_up
from moemerge.sources.gguf.mixtures import open_gguf_mixture
from moemerge.sources.model_folder import ModelFolder, open_model
from moemerge.sources.name_prefixes import module_of
from moemerge.sources.quantised.table import dequantised, unread_method
from moemerge.sources.tensor_tables import read_tensor_table
from moemerge.sources.text_models import text_tensors

_NUMBERED_EXPERT: Final = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_STACKED_EXPERTS: Final = re.compile(r"(?:^|\.)experts\.|block_sparse_moe\.(?:input|output)_linear\.|_exps\.")
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
            found.append(f"tensors that are not floats, such as quantised weights, were not looked at: {kinds}")
        return found


@dataclass(frozen=True)
class Held:
    """Some tensors of a checkpoint."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """A summary of a checkpoint."""

    reference: str
    model_type: str
    layers: int | None
    experts: int
    """Number of experts; 0 for a dense model."""
    experts_per_token: int | None
    """Number of experts that take a token, the most of all layers; None for a dense model."""
    total_parameters: int
    """Number of parameters; those of quantised weights are counted, not the integers that store them."""
    active_parameters: int
    tensors: int
    """Number of tensors that are stored."""
    files: dict[str, int]
    """Map from file name to size in bytes."""
    dtype_bytes: dict[str, int]
    """Map from stored dtype to bytes of tensors."""
    quantised: tuple[str, ...]
    """Ways in which quantised weights are stored, in words; empty where there are none."""
    beside_text: dict[str, Held]
    """Tensors of a multimodal model that are no part of its text model, by module: `model.visual`."""
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
    model, tensors = _open(reference, announce)
    plain = dequantised(model.config, tensors)
    stored = list(dict.fromkeys(leaf for tensor in tensors.values() for leaf in leaves(tensor)))
    files = {path.name: size_of(path) for path in {tensor.path for tensor in stored}}
    per_token = _experts_per_token(model.config)
    experts = _count_experts(tensors)
    idle = (experts - per_token) / experts if experts and isinstance(per_token, int) else 0
    total, active = _count_parameters(plain, idle)
    warnings = (
        *(note.removeprefix(f"{reference}: ") for note in model.notes),
        *_expert_warnings(model, experts),
        *_file_warnings(model, files),
        *_tensor_warnings(tensors, plain),
        *_size_warnings(model, sum(tensor.nbytes for tensor in stored)),
    )
    return Inspection(
        reference=reference,
        model_type=model.stored_type,
        layers=model.config.get("num_hidden_layers"),
        experts=experts,
        experts_per_token=per_token if experts else None,
        total_parameters=total,
        active_parameters=active,
        tensors=len(tensors),
        files=dict(sorted(files.items())),
        dtype_bytes=_count_bytes(stored),
        quantised=_quantised(model, plain),
        beside_text=_beside_text(model, tensors),
        warnings=warnings,
        values=_look_at_all(stored, progress) if values else None,
    )


def _open(reference: str, announce: Callable[[str], None]) -> tuple[ModelFolder, dict[str, TensorInfo]]:
    """Open a model, and read the table of all its tensors by their stored names."""
    if mixture := open_gguf_mixture(reference):
        return mixture
    model = open_model(reference, announce)
    return model, read_tensor_table(model, announce, weights="stream", whole=True)


def _quantised(model: ModelFolder, plain: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Say how quantised weights are stored, or which method that is not read has stored them."""
    unread = unread_method(model.config)
    if unread and any(tensor.dtype not in CONFIG_DTYPES for tensor in plain.values()):
        return (f"{unread}, which moemerge does not read",)
    return tuple(kinds_of(plain.values()))


def _beside_text(model: ModelFolder, tensors: dict[str, TensorInfo]) -> dict[str, Held]:
    """Add up the tensors of a multimodal model that are no part of its text model, by module."""
    if model.whole is None:
        return {}
    _, others = text_tensors(model.whole, tensors, lambda _, table: table)
    modules: dict[str, list[int]] = {}
    for name, tensor in others.items():
        modules.setdefault(module_of(name), []).append(tensor.nbytes)
    return {module: Held(len(sizes), sum(sizes)) for module, sizes in modules.items()}


def _experts_per_token(config: dict[str, Any]) -> Any:
    per_token = next((config[key] for key in _PER_TOKEN_KEYS if key in config), None)
    return max(per_token, default=None) if isinstance(per_token, list) else per_token  # a list is by layer


def _count_parameters(tensors: dict[str, TensorInfo], idle: float) -> tuple[int, int]:
    """Count all parameters, and those that a token passes, where `idle` is the share of experts that it does not."""
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    in_experts = sum(math.prod(tensor.shape) for tensor in tensors.values() if _is_expert(tensor))
    return total, total - round(in_experts * idle)


def _count_bytes(tensors: Collection[TensorInfo]) -> dict[str, int]:
    """Add up the bytes of tensors by their dtype."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[tensor.dtype] += tensor.nbytes
    return dict(found)


def _expert_warnings(model: ModelFolder, experts: int) -> list[str]:
    claimed = next((model.config[key] for key in _EXPERT_COUNT_KEYS if key in model.config), 0) or 0  # null: none
    return [f"config.json announces {claimed} experts, the tensors hold {experts}"] if experts != claimed else []


def _file_warnings(model: ModelFolder, files: Collection[str]) -> list[str]:
    """Warn of weights in the folder that are not among the files that a reader loads."""
    stale = sorted(
        path.name
        for path in model.folder.glob("*.safetensors")
        if path.name not in files and path.name.startswith("model")
    )
    noted = model.file(SAFETENSORS_INDEX) and SINGLE_SAFETENSORS in files  # the folder's own notes speak of them
    return [f"{', '.join(stale)}: not in the index, so no reader loads it"] if stale and not noted else []


def _tensor_warnings(stored: dict[str, TensorInfo], plain: dict[str, TensorInfo]) -> list[str]:
    """Warn of tensors that cannot be read; biases that quantisation only adds are not among them."""
    known = reasons(stored)
    found = {name: why for name, why in reasons(plain).items() if name in known or not is_no_tensor(plain[name])}
    lost = [f"{name} {reason}" for name, reason in found.items()]
    more = [f"{len(lost) - _LISTED} more such tensors"] if lost[_LISTED:] else []
    return [*lost[:_LISTED], *more, *notes_on(stored)]


def _size_warnings(model: ModelFolder, stored: int) -> list[str]:
    """Warn of an index whose total differs from the bytes of tensors that the headers add up to."""
    index = model.file(SAFETENSORS_INDEX)
    metadata = read_json(index).get("metadata") if index else None
    announced = metadata.get("total_size") if isinstance(metadata, dict) else None
    if announced is None or announced == stored or model.adapters:
        return []
    return [f"{SAFETENSORS_INDEX} announces {announced} bytes of tensors, the headers {stored}"]


def _look_at_all(tensors: Collection[TensorInfo], progress: Callable[[int, int], None]) -> Values:
    """Look at every number of some tensors, in the order of their bytes in each file."""
    ordered = sorted(tensors, key=lambda tensor: (str(tensor.path), tensor.start, tensor.name))
    floats = [tensor for tensor in ordered if has_floats(tensor.dtype)]
    here = all(isinstance(tensor.path, Path) for tensor in floats)
    report = adding_up(progress, sum(tensor.nbytes for tensor in floats))
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
