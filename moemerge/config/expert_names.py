"""Names of experts for people: those of the config, else unique ones made of the models' names."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

LONGEST_NAME: Final = 60
"""Most characters of a name."""
# Folders that trainers and the Hub's cache make within a model's own.
_INNER: Final = re.compile(r"checkpoint-\d+|snapshots|[0-9a-f]{40}")
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
    it is added, as in `runs-math`; models that are all alike are numbered.

    Args:
        models: references of the experts' models, as a config names them.
        given: the names that the config gives, None for an expert without one; nothing where it gives none.
    """
    kept = [*given, *[None] * (len(models) - len(given))]
    parts = [_parts(model) for model in models]
    most = max(map(len, parts), default=0)
    names = [name or parts[expert][-1] for expert, name in enumerate(kept)]
    for depth in range(2, most + 1):
        for expert in _alike(names):
            names[expert] = kept[expert] or "-".join(parts[expert][-depth:])
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


def _parts(model: str) -> list[str]:
    """The parts of a reference that name something, the last one last; an adapter stands for its model."""
    path = re.split(r"[/\\]", model.rpartition("+")[2] or model)
    path = [*path[:-1], path[-1].partition("@")[0]]
    named = [_CACHED.sub("", part, count=1) for part in path if part not in {"", ".", "..", "~"}]
    outer = [part for part in named if not _INNER.fullmatch(part)] or named or [model]
    return [re.sub(r"[\s=,]+", "-", part).strip("-") or "model" for part in outer]


def _alike(names: Sequence[str]) -> list[int]:
    counts = Counter(name.lower() for name in names)
    return [expert for expert, name in enumerate(names) if counts[name.lower()] > 1]


def _numbered(name: str, expert: int, names: Sequence[str]) -> str:
    taken = {other.lower() for other in names}
    while f"{name}-{expert}".lower() in taken:
        name = f"{name}-"
    return f"{name}-{expert}"
