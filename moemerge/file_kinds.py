"""What a path leads to: a model's folder, an adapter, a merge config, weights, or something else."""

import os
from enum import Enum
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Final

YAML_SUFFIXES: Final = frozenset({".yaml", ".yml"})
"""Endings of merge configs."""
PULL: Final = "Run `git lfs pull` in its folder."
"""What to do about a git-lfs pointer."""
POINTER_BEGINNING: Final = b"version https://git-lfs"
"""What a pointer begins with (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
_READ_BYTES: Final = 4096


class Kind(Enum):
    """What a path leads to, in the words of a message that begins with the path."""

    ABSENT = "is not there"
    UNREADABLE = "cannot be read"
    MODEL = "is a model's folder"
    ADAPTER = "is a LoRA adapter's folder"
    FOLDER = "is a folder"
    CONFIG = "is a config"
    MODEL_FILE = "is one file of a model"
    WEIGHTS = "is a file of weights"
    GGUF = "is a GGUF file"
    POINTER = "is a git-lfs pointer in place of the file"
    UTF16 = "is text in UTF-16"
    ARCHIVE = "is an archive"
    PROGRAM = "is a program"
    EMPTY = "is empty"
    BINARY = "is not a text file"
    OTHER = "is not a regular file"
    TEXT = "is a file"


FOLDERS: Final = frozenset({Kind.MODEL, Kind.ADAPTER, Kind.FOLDER})
"""The kinds of folders."""
_BEGINNINGS: Final[tuple[tuple[bytes, Kind], ...]] = (
    (b"GGUF", Kind.GGUF),
    (POINTER_BEGINNING, Kind.POINTER),
    (b"\xff\xfe", Kind.UTF16),
    (b"\xfe\xff", Kind.UTF16),
    (b"#!", Kind.PROGRAM),
)


def what_is(path: Path) -> Kind:
    """Find what a path leads to, by its name and the first bytes of its file; nothing that it could be raises.

    A name that no file system takes is absent. A folder is a model's by its `config.json`, and an adapter's by its
    `adapter_config.json` alone. A YAML file is a config unless it begins like something else. A file without a kind of
    its own beside a `config.json` is one file of a model.
    """
    try:
        mode = path.stat().st_mode
        if S_ISDIR(mode):
            return _folder(path)
        if not S_ISREG(mode):
            return Kind.OTHER
        with path.open("rb") as file:
            return _file(path, file.read(_READ_BYTES))
    except PermissionError:
        return Kind.UNREADABLE
    except (OSError, ValueError):  # among them names that are too long, or hold a null byte
        return Kind.UNREADABLE if os.path.lexists(path) else Kind.ABSENT


def _folder(path: Path) -> Kind:
    for name, kind in (("config.json", Kind.MODEL), ("adapter_config.json", Kind.ADAPTER)):
        if (path / name).is_file():
            return kind
    return Kind.FOLDER


def _file(path: Path, beginning: bytes) -> Kind:  # noqa: PLR0911  one for each kind
    for magic, kind in _BEGINNINGS:
        if beginning.startswith(magic):
            return kind
    suffix = path.suffix.lower()
    if suffix == ".safetensors" and beginning[8:9] == b"{":
        return Kind.WEIGHTS
    if beginning.startswith(b"PK\x03\x04"):
        return Kind.WEIGHTS if suffix in _WEIGHTS else Kind.ARCHIVE
    if b"\0" in beginning:
        return Kind.WEIGHTS if suffix in _WEIGHTS else Kind.BINARY
    if not beginning.strip(b"\xef\xbb\xbf \t\r\n"):
        return Kind.EMPTY
    if suffix in YAML_SUFFIXES:
        return Kind.CONFIG
    return Kind.MODEL_FILE if _folder(path.parent) is not Kind.FOLDER else Kind.TEXT
