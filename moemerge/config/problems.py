"""Describe a config's problems in terms of its YAML, each with its line and address."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Final

import yaml
from pydantic_core import ErrorDetails

from moemerge.errors import ConfigError
from moemerge.places import Place, address

MOST_EXPLAINED: Final = 100
"""Most problems of a config that are explained; of more, only the number is given."""
SHORT_REPR: Final = reprlib.Repr()
"""`SHORT_REPR.repr(value)` is a shortened repr of a value that may be long."""
SHORT_REPR.maxstring = 60
_OPTIONS: Final = ("cache-dir", "compute-dtype", "device", "keep-states", "low-memory", "max-shard-size")
"""Options of the command line that are taken for keys of a config."""
# By pydantic's name of an error; bounds are those of the field.
_EXPECTED: Final = {
    "int_type": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_too_short": "text",
    "too_short": "a list that is not empty",
    "greater_than": "a number above {gt:.15g}",
    "greater_than_equal": "{number} {ge:.15g} or more",
    "less_than_equal": "{number} {le:.15g} or less",
}
_MERGE_KEY: Final = "<<"


class PlacedError(ConfigError):
    """A wrong config, with the place of each problem, which leads to its line."""

    def __init__(self, placed: list[tuple[Place, str]], name: str = "config", node: yaml.Node | None = None) -> None:
        self.placed = placed
        shown = placed[:MOST_EXPLAINED]
        located = sorted((_line(node, place), address(place), problem) for place, problem in shown)
        lines = [
            f"{f'line {line}: ' if node else ''}{where}: {problem}" if where else problem
            for line, where, problem in located
        ]
        more = [f"and {len(placed) - len(shown)} more"] if len(placed) > len(shown) else []
        super().__init__(f"{name}: {len(placed)} problem{'s' if len(placed) > 1 else ''}:", [*lines, *more])


def explain(detail: ErrorDetails, known_keys: Callable[[Place], list[str]]) -> str:  # noqa: PLR0911  one for each kind
    """Explain one pydantic error in terms of the YAML."""
    key, value = detail["loc"][-1], detail["input"]
    if detail["type"] == "extra_forbidden":
        option = str(key)[:60].replace("_", "-")
        if len(detail["loc"]) == 1 and option in _OPTIONS:
            return f"unknown key; on the command line it is the option --{option}"
        known = known_keys(detail["loc"])
        near = difflib.get_close_matches(str(key)[:60], known, n=1, cutoff=0.5)
        return f"unknown key, did you mean {near[0]}?" if near else f"unknown key; known: {', '.join(known)}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "literal_error":
        choices = detail["ctx"]["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value)[:60], choices.replace(" or ", ", ").split(", "), n=1)
        return f"expected {choices}, found {SHORT_REPR.repr(value)}" + (f"; did you mean {near[0]}?" if near else "")
    if detail["type"] == "string_type":
        in_prompts = any(str(step).endswith("_prompts") for step in detail["loc"])
        return f"expected text, found {SHORT_REPR.repr(value)}" + ("; write it in quotes" if in_prompts else "")
    if detail["type"] == "model_type":
        lacks_space = isinstance(value, str) and re.match(r"[a-z_]+:\S", value)
        hint = "; a space is missing after the colon" if lacks_space else ""
        return f"expected keys with values, found {SHORT_REPR.repr(value)}{hint}"
    if detail["type"] == "list_type":
        without_space = isinstance(value, dict) and all(str(name).startswith("-") for name in value)
        hint = "; a space is missing after the dash" if without_space else ""
        return f"expected a list, in which a line with `- ` begins each item, found {SHORT_REPR.repr(value)}{hint}"
    if detail["type"] == "value_error":
        return f"{detail['ctx']['error']}, found {SHORT_REPR.repr(value)}"
    if expected := _EXPECTED.get(detail["type"]):
        bounds = detail.get("ctx", {})
        # A bound of a whole number is one, that of any number a float.
        number = "a whole number of" if any(type(bound) is int for bound in bounds.values()) else "a number of"
        return f"expected {expected.format(**bounds, number=number)}, found {SHORT_REPR.repr(value)}"
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}, found {SHORT_REPR.repr(value)}"


def _line(root: yaml.Node | None, place: Place) -> int:
    """The line of the innermost step of `place` that the document has."""
    line = root.start_mark.line + 1 if root else 1
    return [line, *(line for line, _ in steps_to(root, place))][-1]


def steps_to(root: yaml.Node | None, place: Place) -> Iterator[tuple[int, yaml.Node]]:
    """Yield the line and the node of each step of a place, as far as the document has it."""
    node = root
    for step in place:
        if isinstance(node, yaml.MappingNode) and (pair := _pair(node, step)):
            marked, node = pair
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            marked = node = node.value[step]
        else:
            return
        yield marked.start_mark.line + 1, node


def _pair(node: yaml.MappingNode, name: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """The key of this name and its value, of the mapping's own keys, else of those that it takes over by `<<`."""
    for key, value in node.value:
        if key.value == name:
            return key, value
    for key, value in node.value:
        taken = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for mapping in taken if key.value == _MERGE_KEY else ():
            if isinstance(mapping, yaml.MappingNode) and (pair := _pair(mapping, name)):
                return pair
    return None


def parts_of(root: yaml.Node | None) -> Iterator[tuple[Place, yaml.Node]]:
    """Yield every part of a document with its place; a part that has several names is given once."""
    waiting: list[tuple[Place, yaml.Node]] = [((), root)] if root else []
    seen: set[int] = set()
    while waiting:
        place, part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield place, part
        if isinstance(part, yaml.SequenceNode):
            waiting += [((*place, index), child) for index, child in enumerate(part.value)]
        elif isinstance(part, yaml.MappingNode):
            waiting += [((*place, str(key.value)), child) for key, child in part.value]


def repeated_keys(root: yaml.Node | None) -> list[tuple[Place, str]]:
    """Find keys that are repeated; YAML silently keeps the last one."""
    problems: list[tuple[Place, str]] = []
    for place, part in parts_of(root):
        lines: dict[str, list[int]] = {}
        for key, _ in part.value if isinstance(part, yaml.MappingNode) else ():
            lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
        for key, found in lines.items():
            if len(found) > 1 and key != _MERGE_KEY:
                where = f", in lines {found[0]} and {found[1]}" if found[0] != found[1] else ""
                problems.append(((*place, key), f"is written twice{where}. Remove one"))
    return problems
