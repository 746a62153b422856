"""Names of experts for people: those of the config, else unique ones made of the models' names."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Final

LONGEST_NAME: Final = 60
"""Most characters of a name."""
# Folders that trainers and the Hub's cache make within a model's own; some say which version of it they hold.
_INNER: Final = re.compile(r"(checkpoint-\d+)|snapshots|([0-9a-f]{7})[0-9a-f]{33}")
_REPOSITORY: Final = re.compile(r"([\w-][\w.-]*(?:/[\w.-]+)?)@(.+)")
# The end of the name of a GGUF file, or of the first of its parts; and of a repository of such files, which one.
_FILE: Final = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)
_TYPED: Final = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?:-gguf)?(@[^:]+)?:[\w./-]+", re.IGNORECASE)
_LONGEST_VERSION: Final = 20
_CACHED: Final = re.compile(r"models--(?:.*--)?")
WRITABLE_NAME: Final = r"[^\s=,](?:[^\n\r\t=,]*[^\s=,])?"
"""A pattern of names."""


def checked_name(name: str) -> str:
    """Check a name that a config gives to an expert.

    Raises:
        ValueError: it cannot be written as `--data NAME=PATH`, or is too long for a table.
    """
    if len(name) > LONGEST_NAME:
        raise ValueError(f"expected at most {LONGEST_NAME} characters")
    if not re.fullmatch(WRITABLE_NAME, name) or not name.isprintable():
        raise ValueError("expected a name without commas, equals signs and line breaks, and no space at its ends")
    return name


def expert_names(models: Sequence[str], given: Sequence[str | None] = ()) -> tuple[str, ...]:
    """Make a unique name for each expert.

    A name that is not given is the last part of the model's name that says something: `math` for
    `runs/math/checkpoint-500`, `user/math@main` and the Hub's cache of it. Where two are alike, the part before
    it is added, as in `runs-math`; where that does not tell them apart, the revision or the checkpoint, as in
    `math-main`. Models that are all alike are numbered. What `checked_name` does not take is cut or replaced.

    Args:
        models: references of the experts' models, as a config names them.
        given: the names that the config gives, None for an expert without one; nothing where it gives none.
    """
    kept = [*given, *[None] * (len(models) - len(given))]
    read = [_parts(model) for model in models]
    most = max((len(parts) for parts, _ in read), default=0)
    names = [name or _cut(parts[-1:]) for name, (parts, _) in zip(kept, read, strict=True)]
    steps = [*((depth, False) for depth in range(2, most + 1)), (1, True), (most, True)]
    for depth, with_version in steps:
        for expert in _alike(names):
            parts, version = read[expert]
            names[expert] = kept[expert] or _cut(parts[-depth:], version if with_version else "")
    for expert in _alike(names):
        if kept[expert] is None:
            names[expert] = _numbered(names[expert], expert, names)
    return tuple(names)


def named_place(number: int, names: Sequence[str]) -> str:
    """Write an expert's place in a config together with its name: `experts[0] (math)`."""
    return f"experts[{number}] ({names[number]})"


def repeated_names(names: Sequence[str | None]) -> list[int]:
    """Numbers of the experts whose given name an earlier expert has, in any case of its letters."""
    lowered = [name.lower() if name else None for name in names]
    return [expert for expert, name in enumerate(lowered) if name and name in lowered[:expert]]


def _parts(model: str) -> tuple[list[str], str]:
    """The parts of a reference that name something, the last one last, and its version; of an adapter's alone.

    An expert of a mixture has its own name; one that is called by a number, the mixture's name before the number.
    """
    reference = model.rpartition("+")[2] or model
    mixture, mark, expert = reference.rpartition("#")
    if mark and mixture and expert:
        parts, version = _parts(mixture)
        own = _writable(expert) or "model"
        return ([*parts[:-1], f"{parts[-1]}-{own}"] if expert.isdecimal() else [*parts, own]), version
    if typed := _TYPED.fullmatch(reference):
        reference = f"{typed[1]}{typed[2] or ''}"
    repository = _REPOSITORY.fullmatch(reference)
    path = re.split(r"[/\\]", repository[1] if repository else _FILE.sub("", reference))
    named = [_CACHED.sub("", part, count=1) for part in path if part not in {"", ".", "..", "~"}]
    outer = [part for part in named if not _INNER.fullmatch(part)]
    inner = [match[1] or match[2] for part in named if outer and (match := _INNER.fullmatch(part))]
    version = repository[2] if repository else next(filter(None, reversed(inner)), "")
    return [_writable(part) or "model" for part in outer or named or [model]], _writable(version)


def _writable(part: str) -> str:
    """Replace what no name may hold."""
    shown = "".join(letter if letter.isprintable() else "-" for letter in part)
    return re.sub(r"[\s=,/]+", "-", shown).strip("-")


def _cut(parts: Sequence[str], version: str = "") -> str:
    """Join the parts of a name, and a version if there is one; a long name is cut before its version."""
    end = f"-{version[:_LONGEST_VERSION]}" if version else ""
    return f"{'-'.join(parts)[: LONGEST_NAME - len(end)].strip('-')}{end}"


def _alike(names: Sequence[str]) -> list[int]:
    counts = Counter(name.lower() for name in names)
    return [expert for expert, name in enumerate(names) if counts[name.lower()] > 1]


def _numbered(name: str, expert: int, names: Sequence[str]) -> str:
    taken = {other.lower() for other in names}
    numbered = (f"{name[: LONGEST_NAME - len(str(number)) - 1]}-{number}" for number in count(expert))
    return next(found for found in numbered if found.lower() not in taken)
