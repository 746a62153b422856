"""Texts in three domains that every machine with this virtual environment has: Python, English and C++."""

import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

STDLIB: Final = Path(sysconfig.get_path("stdlib"))
PACKAGES: Final = Path(sysconfig.get_path("purelib"))
# Other packages, what some systems leave out, odd input of tests, tables, and Python's manual, which is English.
SKIPPED: Final = {
    "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
HEADERS: Final = ("c10", "ATen/core", "torch/csrc")
DOCUMENTED: Final = ("networkx", "numpy", "sympy", "torch")

FILE_CHARS: Final = 10_000  # of one file, so that no long file stands for its domain
DOMAIN_CHARS: Final = 1_400_000  # about what there is of English
HELD_OUT: Final = 0.1

DOCSTRING: Final = re.compile(r'"""(.*?)"""', re.DOTALL)
# A paragraph that begins and ends as a sentence does and has no sign that only code and markup use.
SENTENCES: Final = re.compile(r"[A-Z\"'(][^=<>{}\[\]\\|_#$@^~`*]*[.:!?]['\")]*")


def read_domains() -> dict[str, tuple[list[str], list[str]]]:
    """By domain: the texts to train on and those held out; a file's text is in one of the two, whole."""
    return {name: _split(files()) for name, files in DOMAINS.items()}


def _split(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    chosen, chars = [], 0
    shuffled = [text[:FILE_CHARS] for text in texts if text.strip()]
    random.Random(0).shuffle(shuffled)
    for text in shuffled:
        if chars < DOMAIN_CHARS:
            chosen.append(text)
            chars += len(text)
    held_out = round(len(chosen) * HELD_OUT)
    return chosen[held_out:], chosen[:held_out]


def _python() -> Iterator[str]:
    for path in sorted(STDLIB.rglob("*.py")):
        if not SKIPPED & set(path.relative_to(STDLIB).parts):
            yield _read(path)


def _cpp() -> Iterator[str]:
    for folder in HEADERS:
        for path in sorted((PACKAGES / "torch" / "include" / folder).rglob("*.h")):
            if "generated" not in str(path):
                yield _read(path)


def _english() -> Iterator[str]:
    """Python's manual, licences and the docstrings of packages: paragraphs of prose, each kept once.

    Licences repeat each other with small changes: a paragraph that begins like an earlier one is dropped.
    """
    seen = set()
    for text in _english_sources():
        kept = []
        for lines in re.split(r"\n\s*\n", text):
            paragraph = " ".join(lines.split())
            if _is_prose(paragraph) and paragraph[:60] not in seen:
                seen.add(paragraph[:60])
                kept.append(paragraph)
        yield "\n\n".join(kept)


def _english_sources() -> Iterator[str]:
    for name in sorted(topics):
        yield topics[name]
    for path in [*sorted(STDLIB.glob("LICENSE*")), *sorted(PACKAGES.glob("*.dist-info/**/*LICEN[CS]E*"))]:
        if path.is_file():
            yield _read(path)
    for package in DOCUMENTED:
        for path in sorted((PACKAGES / package).rglob("*.py")):
            yield "\n\n".join(DOCSTRING.findall(_read(path)))


def _is_prose(paragraph: str) -> bool:
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return len(paragraph) >= 100 and letters > 0.93 * len(paragraph) and bool(SENTENCES.fullmatch(paragraph))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


DOMAINS: Final[dict[str, Callable[[], Iterator[str]]]] = {"python": _python, "english": _english, "cpp": _cpp}
