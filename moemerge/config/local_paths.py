"""Paths in a config: with `~` and variables, and relative to the file that names them, wherever moemerge runs."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any, Final

from moemerge.places import Place

_VARIABLE: Final = re.compile(r"\$(\w+|\{\w+\})")
_REMOTE: Final = "hf://"
_TEXTS: Final = ("positive_texts", "negative_texts")


def with_paths_from(document: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[tuple[Place, str]]]:
    """Make the paths of a config's document lead somewhere from the current folder.

    `~` and `$NAME` are replaced. A relative path counts from `folder` if it leads somewhere there, else from the
    current folder. Whatever is no path here, such as the name of a repository on the Hub, stays as it is.

    Args:
        document: the config as keys and values; it is not changed.
        folder: the folder of the file that the config was read from; None if there is none.

    Returns:
        The document, and its problems: variables that are not set.
    """
    problems: list[tuple[Place, str]] = []

    def moved(place: Place, text: str, *, pattern: bool) -> str:
        expanded = os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111  Path.expanduser raises
        unset = _VARIABLE.search(expanded)
        if unset and not os.path.lexists(text):
            problems.append((place, f"the variable {unset[0]} is not set, found {text!r:.100}"))
            return text
        return expanded if folder is None else _from_folder(expanded, folder, pattern=pattern)

    return _with_paths(document, moved), problems


def paths_from(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the relative paths of a config's document, which lead somewhere from the current folder, lead from `folder`.

    This is the way back from `with_paths_from`; absolute paths stay as they are.
    """

    def moved(_: Place, text: str, *, pattern: bool) -> str:
        def one(path: str) -> str:
            return os.path.relpath(_plain(os.path.join(Path.cwd(), path)), folder.resolve())  # noqa: PTH118

        return _moved(text, lambda path: one(path) if _leads(path, pattern=pattern) else None, pattern=pattern)

    return _with_paths(document, moved)


def absolute_paths(document: dict[str, Any]) -> dict[str, Any]:
    """Make every path that leads somewhere absolute, so that two configs can be compared."""

    def moved(_: Place, text: str, *, pattern: bool) -> str:
        def one(path: str) -> str | None:
            return os.path.realpath(path) if _leads(path, pattern=pattern) else None

        return _moved(text, one, pattern=pattern, absolute=True)

    return _with_paths(document, moved)


def _from_folder(text: str, folder: Path, *, pattern: bool) -> str:
    start = os.path.realpath(folder)
    if start == os.path.realpath(Path.cwd()):
        return text

    def one(path: str) -> str | None:
        there = os.path.join(escape(start) if pattern and has_magic(path) else start, path)  # noqa: PTH118
        if not _leads(there, pattern=pattern):
            return None
        whole = _plain(there)
        return min(os.path.relpath(whole), whole, key=len)

    return _moved(text, one, pattern=pattern)


def _moved(text: str, one: Callable[[str], str | None], *, pattern: bool, absolute: bool = False) -> str:
    """Replace a path, or in `mixture#expert+adapter` each one, by what `one` makes of it; None keeps it."""
    if text.startswith(_REMOTE) or not text or (os.path.isabs(text) and not absolute):  # noqa: PTH117
        return text
    if not pattern:
        one = partial(_before_expert, one)
    whole = one(text)
    if whole is not None or pattern or "+" not in text:
        return text if whole is None else whole
    parts = text.split("+")
    for end in range(len(parts) - 1, 0, -1):  # the longest beginning that is a folder
        first = one("+".join(parts[:end]))
        if first is not None or end == 1:
            rest = _moved("+".join(parts[end:]), one, pattern=False, absolute=absolute)
            return f"{parts[0] if first is None else first}+{rest}"
    raise AssertionError("a text with a plus has two parts")  # pragma: no cover


def _before_expert(one: Callable[[str], str | None], text: str) -> str | None:
    """Replace a path, or that of the mixture in `mixture#expert`."""
    whole = one(text)
    mixture, mark, expert = text.rpartition("#")
    if whole is not None or not (mark and mixture and expert) or "+" in expert:
        return whole
    moved = one(mixture)
    return None if moved is None else f"{moved}#{expert}"


def _plain(path: str) -> str:
    """Write a path without `..`; links keep their names, which may name an expert, unless `..` follows one."""
    plain = os.path.normpath(path)
    whole = os.path.realpath(path)
    return plain if os.path.realpath(plain) == whole else whole


def _leads(path: str, *, pattern: bool) -> bool:
    try:  # a file that is no model is one too, whose own message is better than one about a repository
        return os.path.exists(path) or (pattern and bool(glob(path, recursive=True)))  # noqa: PTH110, PTH207
    except (OSError, ValueError):  # a text in place of a path; a null byte
        return False


def path_values(document: dict[str, Any]) -> Iterator[tuple[Place, str, bool]]:
    """List the values of a document that are paths or patterns: the place, the text, and whether it is a pattern."""
    yield from _texts(document, (), ("base_model",), pattern=False)
    for key in ("experts", "shared_experts"):
        experts = document.get(key)
        for number, expert in enumerate(experts if isinstance(experts, list) else []):
            if isinstance(expert, dict):
                yield from _texts(expert, (key, number), ("source_model",), pattern=False)
                yield from _texts(expert, (key, number), _TEXTS, pattern=True)
    router = document.get("router")
    if isinstance(router, dict):
        yield from _texts(router, ("router",), ("calibration_texts",), pattern=True)


def _texts(
    held: dict[str, Any], place: Place, keys: tuple[str, ...], *, pattern: bool
) -> Iterator[tuple[Place, str, bool]]:
    for key in keys:
        value = held.get(key)
        if isinstance(value, str):
            yield (*place, key), value, pattern
        for index, text in enumerate(value if isinstance(value, list) else []):
            if isinstance(text, str):
                yield (*place, key, index), text, pattern


def _with_paths(document: dict[str, Any], moved: Callable[..., str]) -> dict[str, Any]:
    changes = {place: moved(place, text, pattern=pattern) for place, text, pattern in path_values(document)}
    return replaced(document, changes)


def replaced(document: dict[str, Any], changes: Mapping[Place, str]) -> dict[str, Any]:
    """Copy a document with other values at some places; what holds none of them is not copied."""
    result: Any = document
    for place, text in changes.items():
        result = _with_value(result, place, text)
    return dict(result)


def _with_value(value: Any, place: Place, text: str) -> Any:
    if not place:
        return text
    copied = value.copy()
    copied[place[0]] = _with_value(value[place[0]], place[1:], text)
    return copied
