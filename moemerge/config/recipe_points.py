"""The open values of a recipe: choices and ranges where a merge config has one value, and experts that may be left out.

A list is a choice, except where a config takes a list; there, and anywhere else, `{choices: [...]}` is one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moemerge.config.json_schema import published_schema
from moemerge.config.problems import SHORT_REPR
from moemerge.places import Place

_CHOICES: Final = "choices"
_RANGES: Final = ("range", "log")
_MARKS: Final = frozenset({_CHOICES, *_RANGES})
_PROMPTS: Final = frozenset({"positive_prompts", "negative_prompts"})
_OPTIONAL: Final = "optional"
_BOUNDS: Final = 2


class LeftOut:
    """Stands for an expert that a recipe leaves out."""


@dataclass(frozen=True)
class Option:
    """One of the values of a choice; parts of it may be open, too."""

    place: Place
    """Where it is in the recipe."""
    value: Any


@dataclass(frozen=True)
class Choice:
    """A value that is one of several."""

    place: Place
    options: tuple[Option, ...]

    @property
    def alternatives(self) -> list[int]:
        """Numbers of all options but the first."""
        return list(range(1, len(self.options)))


@dataclass(frozen=True)
class Range:
    """A number between two bounds, which belong to the range."""

    place: Place
    low: float
    high: float
    log: bool
    """Whether numbers are drawn evenly by their logarithms."""
    whole: bool
    """Whether it is a whole number."""

    @property
    def alternatives(self) -> list[float]:
        """The bound that is not the first value."""
        return [self.high]


Point = Choice | Range
"""An open value of a recipe."""


class PointReader:
    """Reads a recipe's document, and collects what is wrong with its open values."""

    def __init__(self) -> None:
        self.problems: list[tuple[Place, str]] = []
        self._lists, self._whole = _keys_by_type()

    def read(self, value: Any, place: Place = ()) -> Any:
        """Copy a document; `Choice` and `Range` take the place of its open values."""
        key = next((step for step in reversed(place) if isinstance(step, str) and step not in _MARKS), "")
        if isinstance(value, Mapping):
            if marks := _MARKS.intersection(value):
                return self._marked(value, place, key, min(marks))
            return value if key in _PROMPTS else self._keys(value, place)
        if not isinstance(value, list) or key in _PROMPTS:
            return value
        if key not in self._lists:
            return self._choice(value, place, place)
        return [self._element(held, (*place, index)) for index, held in enumerate(value)]

    def _keys(self, value: Mapping[Any, Any], place: Place) -> dict[Any, Any]:
        return {key: self.read(held, (*place, key)) for key, held in value.items()}

    def _element(self, value: Any, place: Place) -> Any:
        """Read an element of a list of the config, which may be an expert that may be left out."""
        if not isinstance(value, dict):
            return value
        if place[:-1] != ("experts",) or _OPTIONAL not in value:
            return self.read(value, place)
        optional = value[_OPTIONAL]
        held = self.read({key: part for key, part in value.items() if key != _OPTIONAL}, place)
        if not isinstance(optional, bool):
            self.problems.append(((*place, _OPTIONAL), f"expected true or false, found {SHORT_REPR.repr(optional)}"))
        return Choice(place, (Option(place, held), Option(place, LeftOut()))) if optional is True else held

    def _marked(self, value: Mapping[Any, Any], place: Place, key: str, mark: str) -> Any:
        if len(value) > 1:
            others = ", ".join(map(str, value.keys() - {mark}))
            self.problems.append((place, f"{mark} stands by itself, found {others[:60]} beside it"))
            return None
        if mark == _CHOICES:
            return self._choice(value[mark], place, (*place, mark))
        return self._range(value[mark], (*place, mark), log=mark == "log", whole=key in self._whole)

    def _choice(self, options: Any, place: Place, inside: Place) -> Any:
        if not isinstance(options, list) or not options:
            found = SHORT_REPR.repr(options)
            self.problems.append((inside, f"expected a list of values to choose from, found {found}"))
            return None
        listed = [index for index, option in enumerate(options) if isinstance(option, list) and inside == place]
        self.problems += [((*inside, index), "is a choice within a choice: write one list") for index in listed]
        if listed:
            return None
        read = (self._option(option, (*inside, index)) for index, option in enumerate(options))
        return Choice(place, tuple(read))

    def _option(self, value: Any, place: Place) -> Option:
        plain = isinstance(value, list)  # of a key that takes lists
        return Option(place, value if plain else self.read(value, place))

    def _range(self, bounds: Any, place: Place, *, log: bool, whole: bool) -> Any:
        found = [_number(bound, whole=whole) for bound in bounds] if isinstance(bounds, list) else []
        low, high = found if len(found) == _BOUNDS else (None, None)
        if low is None or high is None or not low < high or (log and low <= 0):
            kind = "whole numbers" if whole else "numbers"
            above = " above 0" if log else ""
            self.problems.append(
                (place, f"expected two {kind}{above}, the smaller one first, found {SHORT_REPR.repr(bounds)}")
            )
            return None
        return Range(place[:-1], low, high, log, whole)


def _number(value: Any, *, whole: bool) -> float | None:
    """A bound of a range; YAML 1.1 reads 1e-2 as a text."""
    if isinstance(value, bool) or (whole and not isinstance(value, int)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _keys_by_type() -> tuple[frozenset[str], frozenset[str]]:
    """The keys of a config that take lists, and those that take whole numbers alone."""
    schema = json.loads(published_schema())
    parts = [schema, *schema["$defs"].values()]
    keys = [pair for part in parts for pair in part.get("properties", {}).items()]
    lists = frozenset(key for key, value in keys if "array" in _types(value))
    return lists, frozenset(key for key, value in keys if _types(value) <= {"integer", "null"} and _types(value))


def _types(schema: Mapping[str, Any]) -> set[str]:
    given = schema.get("type", [])
    own = {given} if isinstance(given, str) else set(given)
    return own.union(*map(_types, schema.get("anyOf", ())))
