"""Find the GGUF files that a reference leads to, here or elsewhere: one file, or the parts that it is split into."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from moemerge.errors import CheckpointError, NoSuchModelError
from moemerge.sources.local import resolve_file

# https://github.com/ggml-org/llama.cpp/blob/master/tools/gguf-split/README.md
_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_SUFFIX: Final = ".gguf"
# What lies beside models: image encoders, importance matrices.
_NO_MODEL: Final = re.compile(r"(^|/)(mmproj|imatrix)[^/]*$|imatrix\.gguf$", re.IGNORECASE)
# Weights that a folder's model is read from before any GGUF file.
_OTHER_WEIGHTS: Final = (".safetensors", ".bin", ".safetensors.index.json")
_SHOWN: Final = 12


def find_ggufs(reference: str, path: Path) -> list[Path]:
    """Find the GGUF files of a model on this machine; none for a folder with other weights, or without any.

    Args:
        reference: the reference as the config writes it.
        path: a GGUF file, which may be the first of several parts, or a folder.

    Raises:
        NoSuchModelError: the folder holds GGUF files of several models.
        CheckpointError: a part is not there, or a link leads out of the Hub's cache.
    """
    if path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if _PART.fullmatch(path.name) else []
        return [resolve_file(path.parent, name) for name in parts_of(path.name, beside)]
    return [resolve_file(path, name) for name in _only_model(reference, [entry.name for entry in path.iterdir()])]


def find_in_store(reference: str, named: str, names: Collection[str]) -> list[str]:
    """Find the GGUF files of a model in an object store; none for a folder with other weights, or without any.

    Args:
        reference: the reference as the config writes it.
        named: the name of a file, which may be the first of several parts; empty where the reference names a folder.
        names: names of the folder's files.

    Raises:
        NoSuchModelError: there is no such file, or the folder holds GGUF files of several models.
        CheckpointError: a part is not there.
    """
    if not named:
        return _only_model(reference, names)
    if named not in names:
        raise NoSuchModelError(f"{reference}: there is no such object in the store.")
    return parts_of(named, names)


def _only_model(reference: str, names: Collection[str]) -> list[str]:
    """The GGUF files of the only model among names of files; none where there are other weights, or no model."""
    if any(name.endswith(_OTHER_WEIGHTS) for name in names):
        return []
    models = models_in(names)
    if len(models) > 1:
        raise NoSuchModelError(f"{reference}: holds {len(models)} GGUF files. Name one of them: {_listed(models)}.")
    return parts_of(models[0], names) if models else []


def find_on_hub(reference: str, tag: str, names: Collection[str]) -> list[str]:
    """Find the GGUF files of a model in a repository; none where it names none and has several kinds of weights.

    Args:
        reference: the reference as the config writes it.
        tag: the name of a file, or its end, such as `Q4_K_M`; empty where the reference names none.
        names: names of the repository's files.

    Raises:
        NoSuchModelError: no file has that name, or several have it, or none is named of several.
        CheckpointError: a part is not there.
    """
    if not tag and any(name.endswith(_OTHER_WEIGHTS) for name in names):
        return []
    models = models_in(names)
    if not models:
        if not tag:
            return []
        raise NoSuchModelError(f"{reference}: the repository holds no GGUF file.")
    chosen = [name for name in models if not tag or _is_called(name, tag)]
    if len(chosen) == 1:
        return parts_of(chosen[0], names)
    repository = reference.removesuffix(f":{tag}")
    count = f"{len(chosen)} GGUF files" if chosen else "no GGUF file"
    raise NoSuchModelError(
        f"{reference}: the repository holds {count}{f' called {tag}' if tag else ''}. Write {repository}:NAME with one "
        f"of these names, or with the end of one: {_listed(chosen or models)}."
    )


def _is_called(name: str, tag: str) -> bool:
    """Whether a file has a name, or is of a type: the end of its name, or a folder that it lies in."""
    plain = match[1] if (match := _PART.fullmatch(name)) else name.removesuffix(_SUFFIX)
    return tag.lower() in {name.lower(), plain.lower()} or bool(
        re.search(rf"(^|[-._/]){re.escape(tag)}$", plain, re.IGNORECASE)
    )


def models_in(names: Collection[str]) -> list[str]:
    """List the models in GGUF among names of files, each by its file, or by the first of its parts."""
    found = sorted(name for name in names if name.lower().endswith(_SUFFIX) and not _NO_MODEL.search(name))
    return [name for name in found if not (match := _PART.fullmatch(name)) or int(match[2]) == 1]


def parts_of(name: str, names: Collection[str]) -> list[str]:
    """List the parts of the model that a file belongs to, in order; a file that is no part is the whole.

    Raises:
        CheckpointError: a part is not there.
    """
    match = _PART.fullmatch(name)
    if not match:
        return [name]
    parts = [f"{match[1]}-{number:05d}-of-{match[3]}{name[-5:]}" for number in range(1, int(match[3]) + 1)]
    lost = [part for part in parts if part not in names]
    if lost:
        raise CheckpointError(f"{name}: its part {lost[0]} is not there ({len(lost)} of {len(parts)}). Download it.")
    return parts


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if names[_SHOWN:] else "")
