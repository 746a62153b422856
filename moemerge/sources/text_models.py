"""The text model inside a multimodal one, read in place: its `config.json` and its tensors."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.checkpoint.index import PICKLE_INDEX, SAFETENSORS_INDEX, SINGLE_SAFETENSORS, read_weight_map
from moemerge.checkpoint.transposed import Transposed
from moemerge.families.multimodal import disputed_head, has_transposed_stacks, text_alone, text_config
from moemerge.sources.name_prefixes import Table, unwrapped

_STACK: Final = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|down)_proj")


def read_text_config(
    config: dict[str, Any], find: Callable[[str], Path | None]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read the text model's part of a `config.json`; returns it, and the whole if it is of a multimodal model.

    Args:
        config: what `config.json` holds.
        find: finds a file of the model by its name; None where there is none.

    Raises:
        CheckpointError: config and text config disagree on a head, and the file that would tell is damaged.
    """
    part = text_config(config)
    if part is None:
        return text_alone(config), None
    if disputed_head(config) and (names := _stored_names(find)) is not None:
        part["tie_word_embeddings"] = not any(name.endswith("lm_head.weight") for name in names)
    return part, config


def _stored_names(find: Callable[[str], Path | None]) -> Collection[str] | None:
    """The names of a model's tensors, if they are known without a download."""
    for name in (SAFETENSORS_INDEX, PICKLE_INDEX):
        if index := find(name):
            return read_weight_map(index).keys()
    single = find(SINGLE_SAFETENSORS)
    return read_header(single).keys() if single else None


def text_tensors(
    whole: Mapping[str, Any] | None, tensors: Table, noted: Callable[[Sequence[str], Table], Table]
) -> tuple[Table, Table]:
    """Give the tensors of a text model the names that transformers gives one alone; returns them, and all others.

    Args:
        whole: the `config.json` of the multimodal model that holds it; None where it stands alone.
        tensors: all tensors by their names in the files.
        noted: called with notes and the table; returns the table.

    Raises:
        CheckpointError: two tensors would have the same name.
    """
    text, others = unwrapped(tensors, noted, multimodal=whole is not None)
    if whole and has_transposed_stacks(whole):
        text = {name: part for stored, tensor in text.items() for name, part in _experts(stored, tensor)}
    return text, others


def _experts(name: str, tensor: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the matrices in a stack of transposed ones (expert, column, row); any other tensor as it is."""
    match = _STACK.fullmatch(name)
    if match is None or len(tensor.shape) != 3:  # noqa: PLR2004
        yield name, tensor
        return
    for expert in range(tensor.shape[0]):
        entry = tensor.rows(expert, 1)
        matrix = Transposed(replace(entry, shape=entry.shape[1:])).tensor()
        roles = ("gate", "up") if match[2] == "gate_up" else ("down",)
        rows = matrix.shape[0] // len(roles)
        for part, role in enumerate(roles):
            yield f"{match[1]}{expert}.{role}_proj.weight", matrix.rows(part * rows, rows)
