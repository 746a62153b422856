"""Find the files that `--overwrite` may replace: those that a merge writes, and those of a complete checkpoint."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from moemerge.checkpoint.index import SAFETENSORS_INDEX, SINGLE_SAFETENSORS, read_json, read_weight_map
from moemerge.config.schema import CARD, CONFIG_COPY
from moemerge.errors import CheckpointError
from moemerge.file_kinds import Kind, what_is
from moemerge.planning.tokenizer_files import COPIED_FILES, template_names

# Where it is not known yet which of them.
_SHARD: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def is_merge(folder: Path) -> bool:
    """Whether a folder holds a complete model that moemerge has made, by its copy of the config."""
    return what_is(folder) is Kind.MODEL and (folder / CONFIG_COPY).is_file()


def replaceable_files(folder: Path, written: Collection[str] | None = None) -> set[str] | None:
    """Find the files of a folder that a merge may replace; None where the folder holds no complete checkpoint.

    A checkpoint is complete where `config.json` names a model type, and every file of the index, or else
    `model.safetensors`, is there. One that moemerge made is known by its copy of the config; of it shards may be gone.
    Files of a tokenizer that the merge does not write may be the user's.

    Args:
        folder: the folder.
        written: names of the files that the merge will write; None where they are not known yet.
    """
    ours = (folder / CONFIG_COPY).is_file()
    weights = _weights(folder)
    whole = ours or (bool(weights) and all((folder / name).is_file() for name in weights))
    if not (whole and _names_model_type(folder)):
        return None
    held = {*weights, SAFETENSORS_INDEX, "config.json", CARD, CONFIG_COPY}
    if written is None:
        held |= {*COPIED_FILES, *template_names(folder)}
        held |= {path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)}
    return held.union(written or ())


def _names_model_type(folder: Path) -> bool:
    try:
        return isinstance(read_json(folder / "config.json").get("model_type"), str)
    except CheckpointError:
        return False


def _weights(folder: Path) -> set[str]:
    """List the names of a checkpoint's files of weights, whether they exist or not."""
    if not (folder / SAFETENSORS_INDEX).is_file():
        return {SINGLE_SAFETENSORS}
    try:
        names = set(read_weight_map(folder / SAFETENSORS_INDEX).values())
    except CheckpointError:
        return set()
    return names if all(name.endswith(".safetensors") for name in names) else set()
