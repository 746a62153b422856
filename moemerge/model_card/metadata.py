"""Read and write the metadata at the top of a model card, licences above all, which the Hub reads."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.disk import drafted
from moemerge.config.yaml_text import YamlTextError, read_yaml
from moemerge.errors import OutputError, RefusedError
from moemerge.model_card.licences import strictest
from moemerge.sources.model_folder import ModelFolder

_BLOCK: Final = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r?\n|$)", re.DOTALL)
_MOST_CHARACTERS: Final = 100_000
_LONGEST_WORD: Final = 200
_IDENTIFIER: Final = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PAGE: Final = re.compile(r"https?://[^\s<>]+")
_NO_TABLE: Final = "{}: its metadata is not a table in YAML. Correct what stands between its --- lines."


def licence_of(sources: Sequence[ModelFolder]) -> str:
    """Find a merged model's licence from its sources' model cards.

    Raises:
        RefusedError: the cards do not determine one; names every source's.
    """
    adapters = {adapter.reference: adapter.folder for source in sources for adapter in source.adapters}
    folders = {source.reference: source.folder for source in sources} | adapters
    return strictest({reference: read_licence(folder) for reference, folder in folders.items()})


def read_licence(folder: Path) -> str | None:
    """Read the licence in the metadata of a folder's model card; None where it names none.

    A licence without an identifier on the Hub is `other NAME LINK`; a link to a file beside the card is left out, since
    it would lead nowhere from another card. Of several licences, which the Hub allows, all are taken to hold.
    """
    try:
        metadata = read_metadata(folder / "README.md")
    except RefusedError:
        return None
    given = metadata.get("license")
    found = sorted({_identifier(one) for one in (given if isinstance(given, list) else [given])})
    if not all(found) or "unknown" in found:
        return None
    if found == ["other"]:
        name, link = "-".join(_word(metadata.get("license_name")).split()), _word(metadata.get("license_link"))
        is_page = bool(name) and _PAGE.fullmatch(link)
        return " ".join(["other", *([name] if name else []), *([link] if is_page else [])])
    try:
        return strictest({one: one for one in found})
    except RefusedError:
        return "+".join(found)


def set_licence(folder: Path, licence: str) -> None:
    """Put a licence, as the Hub calls it or `other NAME LINK`, into the metadata of a folder's model card.

    If there is no card, one is begun.

    Raises:
        RefusedError: the card's metadata cannot be read.
        OutputError: the card cannot be written.
    """
    from huggingface_hub import metadata_save

    path = folder / "README.md"
    kept = {key: value for key, value in read_metadata(path).items() if not key.startswith("license")}
    with rewritten(path) as draft:
        draft.write_bytes(path.read_bytes() if path.exists() else b"")
        metadata_save(draft, kept | licence_fields(licence))


@contextmanager
def rewritten(path: Path) -> Iterator[Path]:
    """A context with the path of a draft, which then takes the place of the card."""
    try:
        with drafted(path) as draft:
            yield draft
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from error


def _word(value: Any) -> str:
    """A short text of the metadata that can be shown, or an empty text."""
    text = value.strip() if isinstance(value, str) and len(value) <= _LONGEST_WORD else ""
    return text if text.isprintable() else ""


def _identifier(value: Any) -> str:
    """A licence as the Hub calls it, or an empty text."""
    text = _word(value).lower()
    return text if _IDENTIFIER.fullmatch(text) else ""


def read_metadata(card: Path) -> dict[str, Any]:
    """Read the metadata between the first --- lines of a card; an empty table if it is no regular file.

    Raises:
        RefusedError: the metadata is no table in YAML.
    """
    if not card.is_file():
        return {}
    try:
        with card.open(encoding="utf-8", errors="replace") as file:
            block = _BLOCK.match(file.read(_MOST_CHARACTERS))
        metadata = read_yaml(block[1])[0] if block else None
    except OSError:
        return {}
    except YamlTextError as error:
        raise RefusedError(_NO_TABLE.format(card)) from error
    if not isinstance(metadata or {}, dict):
        raise RefusedError(_NO_TABLE.format(card))
    return metadata or {}


def licence_fields(licence: str) -> dict[str, str]:
    """Turn a licence, as the Hub calls it or `other NAME LINK`, into keys of the metadata."""
    return dict(zip(("license", "license_name", "license_link"), licence.split(maxsplit=2), strict=False))
