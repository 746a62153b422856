"""Turn the parts of a config that Python code gives, models and iterators among them, into plain values."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import BaseModel

from moemerge.errors import ConfigError

_DEEPEST: Final = 50
_LARGEST: Final = 10**300


def plain(value: Any, depth: int = 0) -> Any:
    """Turn a document into plain values; parts of it may be models or iterators.

    Raises:
        ConfigError: it is nested too deeply, or holds a number that is too large.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"config: is nested more than {_DEEPEST} deep.", [])
    if isinstance(value, BaseModel):
        return plain(value.model_dump(exclude_unset=True, by_alias=True), depth)
    if isinstance(value, Mapping):
        return {key: plain(held, depth + 1) for key, held in value.items()}
    if isinstance(value, int) and abs(value) >= _LARGEST:  # which Python writes no decimals of
        raise ConfigError("config: holds an integer beyond all floats.", [])
    listed_like = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    return [plain(held, depth + 1) for held in value] if listed_like else value
