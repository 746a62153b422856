"""Problems of several models, each said once, with the models that have it."""

from collections.abc import Iterable
from typing import Final

_MOST_NAMES: Final = 4


def said_once(found: Iterable[tuple[str, str]]) -> list[str]:
    """Write problems, given as (model, cause), as lines; the models that share a cause are named behind it.

    Lines are in the order of the causes, such as `experts[0]: hidden_size is 64. The same holds for experts[2]`.
    """
    models: dict[str, list[str]] = {}
    for model, cause in found:
        models.setdefault(cause, []).append(model)
    return [f"{first}: {cause}{_likewise(others)}" for cause, (first, *others) in models.items()]


def _likewise(others: list[str]) -> str:
    if not others:
        return ""
    more = len(others) - _MOST_NAMES
    return f". The same holds for {', '.join(others[:_MOST_NAMES])}" + (f" and {more} more" if more > 0 else "")
