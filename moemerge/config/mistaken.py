"""Say what was given in place of a merge config: a folder, a model's file, or the config of another program."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

HOW_TO_BEGIN: Final = "`moemerge init BASE EXPERT...` writes a merge config"
"""The next step for whoever has no config yet."""
_EXPECTED: Final = "where a merge config is expected: a YAML file, which `moemerge init BASE EXPERT...` writes."
YAML_SUFFIXES: Final = frozenset({".yaml", ".yml"})
_LFS: Final = b"version https://git-lfs"
_BEGINNINGS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"GGUF", f"is a GGUF file, {_EXPECTED}"),
    (_LFS, "is a git-lfs pointer in place of the file. Run `git lfs pull` in its folder."),
    (b"\xff\xfe", "is text in UTF-16. Save it in UTF-8."),
    (b"\xfe\xff", "is text in UTF-16. Save it in UTF-8."),
    (b"PK\x03\x04", f"is a file of weights or an archive, {_EXPECTED}"),
    (b"#!", f"is a program, {_EXPECTED}"),
)
_READ_BYTES: Final = 4096
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
_LEAST_ALIKE: Final = 0.7


def mistaken_path(path: Path) -> str | None:  # noqa: PLR0911  one for each kind
    """Say why a path leads to no text that could be a config; None if it may lead to one.

    Raises:
        OSError: the file cannot be read.
    """
    if path.is_dir():
        return _mistaken_folder(path)
    if path.exists() and not path.is_file():
        return f"{path}: is not a regular file."
    with path.open("rb") as file:
        beginning = file.read(_READ_BYTES)
    for magic, what in _BEGINNINGS:
        if beginning.startswith(magic):
            return f"{path}: {what}"
    if path.suffix == ".safetensors" and beginning[8:9] == b"{":
        return f"{path}: is a safetensors file, {_EXPECTED}"
    if b"\0" in beginning:
        return f"{path}: is not a text file, {_EXPECTED}"
    if not beginning.strip(b"\xef\xbb\xbf \t\r\n"):
        return f"{path}: is empty. {HOW_TO_BEGIN}."
    return None


def _mistaken_folder(folder: Path) -> str:
    configs = configs_in(folder)
    if configs:
        hint = f"Did you mean {configs[0]}?" if len(configs) == 1 else f"Name one of its files, such as {configs[0]}."
        return f"{folder}: is a folder, where a merge config is expected. {hint}"
    if is_model(folder):
        return f"{folder}: is a model's folder, {_EXPECTED}"
    return f"{folder}: is a folder, {_EXPECTED}"


def configs_in(folder: Path) -> list[Path]:
    """The YAML files of a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in YAML_SUFFIXES and path.is_file())


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


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
