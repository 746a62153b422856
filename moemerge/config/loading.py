"""A merge config read from a YAML file, from its text, or from keys with values."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from moemerge.config.local_paths import with_paths_from
from moemerge.config.mistaken import HOW_TO_BEGIN, mistaken_document, mistaken_path
from moemerge.config.problems import SHORT_REPR, PlacedError, repeated_keys
from moemerge.config.schema import MergeConfig
from moemerge.config.typography import curly_quotes, odd_keys
from moemerge.config.yaml_text import YamlTextError, read_yaml
from moemerge.errors import ConfigError
from moemerge.places import Place

_MOST_CHARACTERS: Final = 4_000_000


def load_config(source: Path | str | Mapping[str, Any], *, allow_identical_experts: bool = False) -> MergeConfig:
    """Read and check a merge config.

    Args:
        source: the path of a YAML file; or its text, which has several lines or begins with a brace; or a dict of
            the same keys and values. A `Path` is never taken for text.
        allow_identical_experts: accept experts that are all the same model.

    Raises:
        ConfigError: lists every problem with its address, and its line in a file.
    """
    if isinstance(source, Mapping):
        document, unset = with_paths_from(dict(source), None)
        return _check(document, "config", None, allow_identical_experts, unset)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"config: expected a path, or keys with values, found {SHORT_REPR.repr(source)}.", [])
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return parse_config(source, allow_identical_experts=allow_identical_experts)
    path = Path(source)
    text = read_text(path)
    config = parse_config(text, str(path), path.parent, allow_identical_experts=allow_identical_experts)
    config.was_read_from(text, path.absolute())
    return config


def read_text(path: Path) -> str:
    """Read the text of a config's file.

    Raises:
        ConfigError: there is no such file, or it cannot be a config.
    """
    try:
        if mistaken := mistaken_path(path):
            raise ConfigError(mistaken, [])
        with path.open(encoding="utf-8-sig") as file:
            return file.read(_MOST_CHARACTERS)
    except OSError as error:
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        )
        raise ConfigError(f"{path}: {reason}.", []) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8. Save it in UTF-8.", []) from error
    except ValueError as error:  # a null byte in its name
        raise ConfigError(f"{path}: cannot be read: {error}.", []) from error


def parse_config(
    text: str, name: str = "config", folder: Path | None = None, *, allow_identical_experts: bool = False
) -> MergeConfig:
    """Check the text of a merge config; see `load_config`.

    Args:
        text: YAML.
        name: what messages call it.
        folder: the folder of its file, from which relative paths count if they lead somewhere there.
        allow_identical_experts: accept experts that are all the same model.

    Raises:
        ConfigError: lists every problem with its address and line.
    """
    document, node = read_document(text, name)
    document, unset = with_paths_from(document, folder)
    config = _check(document, name, node, allow_identical_experts, unset)
    config.was_read_from(text)
    return config


def read_document(text: str, name: str) -> tuple[dict[Any, Any], yaml.Node | None]:
    """Read keys with values from the text of a config; nothing of them is checked, but that they may be a config's.

    Args:
        text: YAML.
        name: what messages call it.

    Returns:
        The document, and its root node, which knows lines.

    Raises:
        ConfigError: the text is not YAML, or something else than a config.
    """
    try:
        document, node = read_yaml(text)
    except YamlTextError as error:
        raise ConfigError(f"{name}: not valid YAML:", [str(error)]) from error
    if odd := odd_keys(node):  # other problems follow from them
        raise PlacedError(odd, name, node)
    if document is None:
        raise ConfigError(f"{name}: holds no keys. {HOW_TO_BEGIN}.", [])
    if not isinstance(document, dict):
        raise ConfigError(
            f"{name}: expected keys such as base_model and experts, found {SHORT_REPR.repr(document)}. {HOW_TO_BEGIN}.",
            [],
        )
    if mistaken := mistaken_document(document, [*MergeConfig.model_fields]):
        raise ConfigError(f"{name}: {mistaken}", [])
    return document, node


def refusal_of(config: MergeConfig, placed: list[tuple[Place, str]]) -> ConfigError:
    """Make an error of problems that show once models are opened, with lines if the config was read from text."""
    name = min(os.path.relpath(config.file), str(config.file), key=len) if config.file else "config"
    return PlacedError(placed, name, read_yaml(config.written)[1] if config.written else None)


def not_named(document: Mapping[Any, Any]) -> list[tuple[Place, str]]:
    """Find keys of a document that are no text."""
    return [((str(key),), "is not the name of a key: expected text") for key in document if not isinstance(key, str)]


def _check(
    document: dict[Any, Any],
    name: str,
    node: yaml.Node | None,
    allow_identical_experts: bool,
    found: Sequence[tuple[Place, str]] = (),
) -> MergeConfig:
    problems = [*repeated_keys(node), *curly_quotes(node), *found, *not_named(document)]
    try:
        config = MergeConfig(
            allow_identical_experts, **{key: value for key, value in document.items() if isinstance(key, str)}
        )
    except PlacedError as error:
        raise PlacedError([*problems, *error.placed], name, node) from None
    if problems:
        raise PlacedError(problems, name, node)
    return config
