"""Parse a model reference of the YAML: a folder or GGUF file here, a repository on the Hub, or an object store."""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from moemerge.errors import NoSuchModelError, SourceError
from moemerge.file_kinds import YAML_SUFFIXES, Kind, what_is
from moemerge.sources.wrong_names import no_folder

# Endings of files, which no repository without an owner has.
_FILES: Final = (".gguf", ".safetensors", ".bin", *YAML_SUFFIXES)


@dataclass(frozen=True)
class Reference:
    """A repository on the Hub: `repo@revision`, or one of its GGUF files: `repo@revision:Q4_K_M`."""

    repo: str
    revision: str | None
    gguf: str = ""
    """The name of a GGUF file, or the end of it: its type."""

    def __str__(self) -> str:
        at = f"{self.repo}@{self.revision}" if self.revision else self.repo
        return f"{at}:{self.gguf}" if self.gguf else at


STORES: Final = {"s3": "s3fs", "gs": "gcsfs", "file": ""}
"""Kinds of object stores by what their addresses begin with, and the package that each of them needs."""
_STORE: Final = re.compile(rf"({'|'.join(STORES)}):/+(.*)", re.DOTALL)
_ADDRESS: Final = re.compile(r"(.*/)?([A-Za-z][A-Za-z0-9]+):(?:/+(.*))?", re.DOTALL)
_RELATIVE: Final = re.compile(r"file://[^/].*", re.DOTALL)
_LEAST_ALIKE: Final = 0.5
_WEB: Final = ("hf:", "http:", "https:")


@dataclass(frozen=True)
class Location:
    """A folder of an object store: `s3://bucket/path`. `file:///path` is a folder here that is read as one."""

    kind: str
    """A key of `STORES`."""
    path: str
    """Bucket and path, without a slash at the end."""
    gguf: str = ""
    """The name of a GGUF file in it, where the address is that of one."""

    def __str__(self) -> str:
        return f"{self.kind}://{self.path}{f'/{self.gguf}' if self.gguf else ''}"


def location_of(text: Path | str) -> Location | None:
    """The place in an object store that a text is the address of; None for any other text.

    A `Path` of an address counts too, which has only one of its two slashes.
    """
    match = _STORE.fullmatch(str(text))
    if match is None or not (path := match[2].strip("/")):
        return None
    path = f"/{path}" if match[1] == "file" else path
    folder, _, name = path.rpartition("/")
    return Location(match[1], folder, name) if folder and name.lower().endswith(".gguf") else Location(match[1], path)


def wrong_address(text: Path | str) -> str | None:
    """Say why a text that looks like an address is none that moemerge reads and writes; None for any other text.

    Of a `Path` it is not seen that the path of a `file://` was relative, since it has only one of its two slashes.
    """
    if _RELATIVE.fullmatch(str(text)):
        return f"{text}: file:// takes an absolute path: file:///PATH."
    match = _ADDRESS.fullmatch(str(text))
    if match is None or location_of(text):
        return None
    before, kind, rest = match.groups()
    if before:
        meant = location_of(f"{kind}:/{rest}") if rest and not _is_folder(f"{before}{kind}:") else None
        return f"{before}{kind}://{rest}: an address begins with {kind}://. Did you mean {meant}?" if meant else None
    if kind in STORES:
        return f"{kind}://: names no folder. Write {'file:///PATH' if kind == 'file' else f'{kind}://BUCKET/PATH'}."
    if rest is None:
        return None
    near = get_close_matches(kind.lower(), STORES, n=1, cutoff=_LEAST_ALIKE)
    hint = f" Did you mean {near[0]}://?" if near else ""
    return f"{kind}://{rest}: moemerge reads and writes s3://, gs:// and file:///, not {kind}://.{hint}"


def parse_reference(text: str) -> Path | Reference | Location:
    """Parse a reference: an object store, else a folder or GGUF file if one of that name exists, else a Hub repository.

    Of an expert, `MIXTURE#NAME`, it is the mixture that is parsed.

    Raises:
        NoSuchModelError: it is neither; says which it looks like and what to write.
    """
    if expert := split_expert(text):
        return parse_reference(expert[0])
    if (wrong := wrong_address(text)) and not _is_folder(text):
        raise NoSuchModelError(wrong + (" A model on the Hub is written user/name." if text.startswith(_WEB) else ""))
    if location := location_of(text):
        return location
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return path.resolve()
        if path.is_file():
            if what_is(path) is Kind.GGUF:
                return path.parent.resolve() / path.name  # whose name may be a link's, with the number of a part
            raise NoSuchModelError(no_folder(text, path, merged=False))
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user that there is not
        kind = SourceError if isinstance(error, PermissionError) else NoSuchModelError
        raise kind(f"{text}: cannot be looked up: {getattr(error, 'strerror', None) or error}.") from error
    return _repository(text)


def _repository(text: str) -> Reference:
    if "/" not in text and Path(text).suffix.lower() in _FILES:
        raise NoSuchModelError(f"{text}: there is no such file.")
    whole, _, gguf = text.partition(":")
    name, _, revision = whole.partition("@")
    if revision and _is_folder(name):
        raise NoSuchModelError(f"{text}: a folder has no revisions. Write {name!r}, or a Hub repository.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "-")) or bool(gguf) != (":" in text):
        raise NoSuchModelError(f"{text}: there is no such folder, and it cannot be a Hub repository (user/name).")
    return Reference(name, revision or None, gguf)


def split_adapter(reference: str) -> tuple[str, str] | None:
    """Split model+adapter in two; of several `+`, at the last that leaves a folder or a repository on both sides."""

    def leads_somewhere(text: str) -> bool:
        try:
            parse_reference(text.partition("+")[0] if "+" in text and not _is_folder(text) else text)
        except SourceError:
            return False
        return True

    if "+" not in reference or _is_folder(reference):
        return None
    places = [match.start() for match in re.finditer(r"\+", reference)][::-1]
    splits = [(reference[:place], reference[place + 1 :]) for place in places]
    return next((split for split in splits if all(map(leads_somewhere, split))), splits[0])


def split_expert(reference: str) -> tuple[str, str] | None:
    """Split MODEL#EXPERT in two, at the last `#`; None for a reference without one, or for a folder's name."""
    model, mark, expert = reference.rpartition("#")
    return (model, expert) if mark and model and expert and not _is_folder(reference) else None


def _is_folder(text: str) -> bool:
    # Path raises for a name that is too long, and for the home of a user that there is not.
    return os.path.isdir(os.path.expanduser(text))  # noqa: PTH111, PTH112


def local_folders(reference: str) -> list[Path]:
    """The folders on this machine that a reference leads to: the model's, and its adapters'."""
    if split := split_adapter(reference):
        return [folder for side in split for folder in local_folders(side)]
    try:
        origin = parse_reference(reference)
    except SourceError:
        return []
    return [origin] if isinstance(origin, Path) else []
