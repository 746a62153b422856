"""Say what was given in place of a merge config: a folder, a model's file, or the config of another program."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from moemerge.file_kinds import FOLDERS, PULL, YAML_SUFFIXES, Kind, what_is

HOW_TO_BEGIN: Final = "`moemerge init BASE EXPERT...` writes a merge config"
"""The next step for whoever has no config yet."""
_EXPECTED: Final = "where a merge config is expected: a YAML file, which `moemerge init BASE EXPERT...` writes."
# What follows of a path that cannot be a config; a model's own files, and text of any kind, show by what they hold.
_NEXT: Final = {
    **dict.fromkeys((*FOLDERS, Kind.WEIGHTS, Kind.GGUF), f", {_EXPECTED}"),
    **dict.fromkeys((Kind.ARCHIVE, Kind.PROGRAM, Kind.BINARY), f", {_EXPECTED}"),
    Kind.POINTER: f". {PULL}",
    Kind.UTF16: ". Save it in UTF-8.",
    Kind.EMPTY: f". {HOW_TO_BEGIN}.",
    Kind.OTHER: ".",
}
# Keys that show what a document is, if it has any of them.
_DOCUMENTS: Final[tuple[tuple[frozenset[str], str], ...]] = (
    (frozenset({"model_type", "architectures"}), f"is a model's config.json, {_EXPECTED}"),
    (frozenset({"peft_type", "lora_alpha"}), f"is an adapter's adapter_config.json, {_EXPECTED}"),
    (frozenset({"weight_map"}), f"is the index of a model's weights, {_EXPECTED}"),
    (
        frozenset({"merge_method", "slices", "models", "modules"}),
        "is a config of mergekit-yaml, which makes one dense model of several. moemerge puts their FFNs side by side "
        f"as experts: {HOW_TO_BEGIN} from their names.",
    ),
)
# A `Path` of an address has one slash.
_ADDRESS: Final = re.compile(r"([A-Za-z][A-Za-z0-9]+):/+(.+)", re.DOTALL)
_LEAST_ALIKE: Final = 0.7


def mistaken_path(path: Path) -> str | None:
    """Say why a path leads to no text that could be a config; None if it may lead to one, or to nothing."""
    kind = what_is(path)
    if kind is Kind.ABSENT:
        return elsewhere(path)
    configs = configs_in(path) if kind in FOLDERS else []
    if configs:
        hint = f"Did you mean {configs[0]}?" if len(configs) == 1 else f"Name one of its files, such as {configs[0]}."
        return f"{path}: is a folder, where a merge config is expected. {hint}"
    return f"{path}: {kind.value}{_NEXT[kind]}" if kind in _NEXT else None


def elsewhere(path: Path) -> str | None:
    """Say of the address of a config, such as `s3://bucket/merge.yaml`, that it cannot be read; None for a path."""
    match = _ADDRESS.fullmatch(str(path))
    if match is None:
        return None
    return f"{match[1]}://{match[2]}: a config is read from this machine. Copy it here, and name the copy."


def configs_in(folder: Path) -> list[Path]:
    """The YAML files of a folder, sorted; none where it cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in YAML_SUFFIXES and path.is_file())
    except OSError:
        return []


def mistaken_document(document: Mapping[Any, Any], known: list[str]) -> str | None:
    """Say what a document is that has no key of a config, or the keys of something else; None if it may be a config."""
    keys = {key for key in document if isinstance(key, str)}
    if "experts" in keys:
        return None
    for marks, what in _DOCUMENTS:
        if marks & keys:
            return what
    if not any(key in known or get_close_matches(key[:60], known, n=1, cutoff=_LEAST_ALIKE) for key in list(keys)[:50]):
        return f"has none of the keys of a merge config, such as base_model and experts. {HOW_TO_BEGIN}."
    return None
