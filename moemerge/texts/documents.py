"""Read documents from what a config or command names, to fit routers to and evaluate models on.

A `.txt` file is one document, or several with a line `<|document|>` between them. A `.jsonl` file has one document a
line, a `.parquet` file or a data set on the Hub one a row: a text, or a chat (see `moemerge.texts.records`). A file
with another ending, which only `moemerge routes` reads, is one document.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from glob import glob
from os.path import expandvars
from pathlib import Path
from typing import Any, Final

from moemerge.chats import Chat, Document, is_blank
from moemerge.errors import RefusedError
from moemerge.sources.data_sets import SCHEME, HubData, parse_hub_data
from moemerge.texts.parquet import parquet_rows
from moemerge.texts.records import read_records

TextSource = Path | HubData
"""Where documents are: a file, or a data set on the Hub."""
_SEPARATOR: Final = re.compile(r"^<\|document\|>\s*$", re.MULTILINE)
_ENDINGS: Final = (".txt", ".jsonl", ".parquet")
# More than any calibration needs: of a larger total, every file is read only in part.
_CHARACTERS: Final = 50_000_000
# Of a data set on the Hub, which has to be downloaded as far as it is read.
_HUB_CHARACTERS: Final = 4_000_000
_KEPT_DATA_SETS: Final = 16


def find_files(patterns: Sequence[str], place: str) -> list[TextSource]:
    """Find what patterns name: a file, a folder with all below it, a glob such as `notes/**/*.txt`, or Hub data.

    Args:
        patterns: relative to the current folder; `~` and `$NAME` are replaced;
            `hf://datasets/user/name:split#column` is a data set on the Hub.
        place: what messages call the key that holds the patterns, such as `experts[0].positive_texts`.

    Raises:
        RefusedError: a pattern finds no `.txt`, `.jsonl` or `.parquet` file, or is no data set; says which other file
            it finds.
    """
    found: list[TextSource] = []
    for index, pattern in enumerate(patterns):
        if pattern.startswith(SCHEME):
            found.append(parse_hub_data(pattern, f"{place}[{index}]"))
            continue
        files = matching_files([pattern])
        if not files:
            if others := sorted(_matches(pattern)):
                raise RefusedError(
                    f"{place}[{index}]: {str(others[0])!r} is there, but texts are read from .txt, .jsonl and .parquet "
                    "files alone. Give plain text the ending .txt, and JSON lines .jsonl."
                )
            start = "the current folder" if place.startswith("-") else "the config's folder, else from the current one"
            raise RefusedError(
                f"{place}[{index}]: {pattern!r} leads to no .txt, .jsonl or .parquet file. Paths count from {start}."
            )
        found += files
    return list({file.resolve() if isinstance(file, Path) else file: file for file in found}.values())


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Find the `.txt`, `.jsonl` and `.parquet` files that patterns lead to; there may be none."""
    return [file for pattern in patterns for file in sorted(_matches(pattern)) if file.suffix in _ENDINGS]


def _matches(pattern: str) -> list[Path]:
    try:
        path = Path(expandvars(pattern)).expanduser()
        if path.is_dir():
            found = [file for ending in _ENDINGS for file in path.rglob(f"*{ending}")]
        elif path.exists():
            found = [path]
        else:
            found = [Path(name) for name in glob(str(path), recursive=True)]  # noqa: PTH207  patterns may be absolute
        return [file for file in found if file.is_file()]
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # a text in place of a path, too long for one; `~` of nobody; a null byte
        return []


def read_documents(files: Sequence[TextSource]) -> list[Document]:
    """Read every document that is not blank, in their order.

    Raises:
        RefusedError: a file cannot be read or is not what its ending says; a document is no text and no chat.
        SourceError: the Hub cannot be reached.
    """
    found: list[Document] = []
    for file in files:
        characters = _CHARACTERS // len(files)
        documents = _streamed(file) if isinstance(file, HubData) else _documents(file, characters)
        found += [document for document in documents if not is_blank(document)]
    return found


def hub_revisions(patterns: Sequence[str]) -> list[str]:
    """Name each data set on the Hub among patterns, with the commit at which it is read, as `user/name at 1a2b...`.

    Raises:
        RefusedError: a pattern is of another form.
        SourceError: the Hub cannot be reached.
    """
    data = [parse_hub_data(pattern, "text") for pattern in patterns if pattern.startswith(SCHEME)]
    if not data:
        return []
    from moemerge.sources.hub_data import commit_of  # imports the Hub's client

    return list(dict.fromkeys(f"{one.repo} at {commit_of(one)}" for one in data))


@lru_cache(_KEPT_DATA_SETS)
def _streamed(data: HubData) -> tuple[Document, ...]:
    """Read a data set once, though a plan and its routers both ask for it."""
    from moemerge.sources.hub_data import hub_rows  # imports the Hub's client

    return tuple(_bounded(read_records(hub_rows(data)), _HUB_CHARACTERS))


def _documents(file: Path, characters: int) -> Iterator[Document]:
    try:
        _check_regular(file)
        if file.suffix == ".parquet":
            yield from _bounded(read_records(parquet_rows(file)), characters)
            return
        with file.open(encoding="utf-8-sig") as opened:
            if file.suffix == ".txt":
                yield from (part.strip("\n") for part in _SEPARATOR.split(opened.read(characters)))
            elif file.suffix not in _ENDINGS:
                yield opened.read(characters)
            else:
                yield from read_records(_lines(opened, file, characters))
    except OSError as error:
        raise RefusedError(f"{file}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RefusedError(f"{file}: cannot be read as text in UTF-8: {error}.") from error


def _check_regular(file: Path) -> None:
    if file.exists() and not file.is_file():
        raise RefusedError(f"{file}: is not a file that can be read to an end. Name a file of text.")


def _lines(opened: Any, file: Path, characters: int) -> Iterator[tuple[str, Any]]:
    """Read JSON line by line, each with its place."""
    read = 0
    for number, line in enumerate(opened, 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RefusedError(f"{place}: is not JSON: {error}.") from error
        read += len(line)
        if read > characters:
            return


def _bounded(documents: Iterator[Document], characters: int) -> Iterator[Document]:
    """Read documents until there are so many characters of them."""
    for document in documents:
        yield document
        said = (message.content for message in document.messages) if isinstance(document, Chat) else (document,)
        characters -= sum(map(len, said))
        if characters <= 0:
            return
