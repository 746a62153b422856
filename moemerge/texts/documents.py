"""Read documents from the files that a config or command names, to fit routers to and evaluate models on.

A `.txt` file is one document, or several with a line `<|document|>` between them. A `.jsonl` file has one document a
line, a string or an object with the key `text`. A file with another ending, which only `moemerge routes` reads, is one
document.
"""

import json
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Final

from moemerge.errors import RefusedError

_SEPARATOR: Final = re.compile(r"^<\|document\|>\s*$", re.MULTILINE)
_ENDINGS: Final = (".txt", ".jsonl")
# More than any calibration needs: of a larger total, every file is read only in part.
_CHARACTERS: Final = 50_000_000


def find_files(patterns: Sequence[str], place: str) -> list[Path]:
    """Find the files that patterns name: a file, a folder with all below it, or a glob such as `notes/**/*.txt`.

    Args:
        patterns: relative to the current folder; `~` is the home folder.
        place: what messages call the key that holds the patterns, such as `experts[0].positive_texts`.

    Raises:
        RefusedError: a pattern finds no `.txt` or `.jsonl` file.
    """
    found = []
    for index, pattern in enumerate(patterns):
        files = matching_files([pattern])
        if not files:
            raise RefusedError(
                f"{place}[{index}]: {pattern!r} leads to no .txt or .jsonl file. Paths count from the current folder."
            )
        found += files
    return list({file.resolve(): file for file in found}.values())


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Find the `.txt` and `.jsonl` files that patterns lead to; there may be none."""
    return [file for pattern in patterns for file in sorted(_matches(pattern)) if file.suffix in _ENDINGS]


def _matches(pattern: str) -> list[Path]:
    try:
        path = Path(pattern).expanduser()
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


def read_documents(files: Sequence[Path]) -> list[str]:
    """Read every document of the files that is not blank, in their order.

    Raises:
        RefusedError: a file cannot be read or is not what its ending says.
    """
    return [text for file in files for text in _documents(file, _CHARACTERS // len(files)) if text.strip()]


def _documents(file: Path, characters: int) -> Iterator[str]:
    try:
        if file.exists() and not file.is_file():
            raise RefusedError(f"{file}: is no file that can be read to an end. Name a file of text.")
        with file.open(encoding="utf-8-sig") as opened:
            if file.suffix == ".txt":
                yield from (part.strip("\n") for part in _SEPARATOR.split(opened.read(characters)))
                return
            if file.suffix not in _ENDINGS:
                yield opened.read(characters)
                return
            read = 0
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield _text(line, f"{file}, line {number}")
                read += len(line)
                if read > characters:
                    return
    except OSError as error:
        raise RefusedError(f"{file}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RefusedError(f"{file}: cannot be read as text in UTF-8: {error}.") from error


def _text(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{place}: is not JSON: {error}.") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise RefusedError(f"{place}: expected a text, or an object with a text under the key 'text'.")
    # JSON can hold unpaired surrogates, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode()
