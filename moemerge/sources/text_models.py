"""The text model inside a multimodal one, read in place: its `config.json`."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from moemerge.checkpoint.header import read_header
from moemerge.checkpoint.index import PICKLE_INDEX, SAFETENSORS_INDEX, SINGLE_SAFETENSORS, read_weight_map
from moemerge.families.multimodal import disputed_head, text_alone, text_config


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
