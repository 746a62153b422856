"""Read untrusted YAML, a merge config or a model card's metadata, in bounded time and memory."""

import re
from copy import deepcopy
from typing import Any, Final

import yaml

from moemerge.config.typography import in_curly_quotes
from moemerge.config.yaml_syntax import explain_syntax
from moemerge.places import Place

# Far above any config; time and memory grow with them. The parser in C, where there is one, is ten times as fast, but
# does not take halves of letters as JSON writes them.
_FAST: Final[Any] = getattr(yaml, "CSafeLoader", None)
_MOST_CHARACTERS: Final = {True: 1_000_000, False: 120_000}
_MOST_VALUES: Final = 50_000
_DEEPEST: Final = 50
# Reading one takes the square of its length, and Python writes none of more than 4300 digits.
_LONGEST_NUMBER: Final = 400
_NUMBERS: Final = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})
_MERGE_KEY: Final = "<<"
_HALF: Final = re.compile(r"\\[uU]0*[dD][89a-fA-F]")


class YamlTextError(Exception):
    """The text is not YAML, or expands to more than moemerge reads; says why, and shows the line that is wrong."""


def read_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Read a YAML document: its value, and its root node as it is written, which knows lines; both None if it is empty.

    Aliases are counted as often as they are used (https://en.wikipedia.org/wiki/Billion_laughs_attack).

    Raises:
        YamlTextError: the text is not YAML, or too large, too deep, or endless.
    """
    loads = _FAST if _FAST and not _HALF.search(text) else yaml.SafeLoader
    most = _MOST_CHARACTERS[loads is _FAST]
    if len(text) > most:
        raise YamlTextError(f"has {len(text)} characters; at most {most} are read")
    try:
        _check_depth(text, loads)
        node = yaml.compose(text, Loader=loads)
        if node is None:
            return None, None
        _check_size(node)
        loader = loads("")
        try:
            # Constructing writes what `<<` takes over into the node, between the keys that the text has.
            return loader.construct_document(deepcopy(node) if _MERGE_KEY in text else node), node
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # libyaml has a limit of its own in some versions
            raise YamlTextError(f"is nested more than {_DEEPEST} deep") from error
        raise YamlTextError(explain_syntax(text, error)) from error
    except YamlTextError:
        raise
    except Exception as error:  # constructors of tags raise whatever their text provokes: `!!bool "x"`
        raise YamlTextError(f"a value does not fit its tag: {type(error).__name__}: {error!s:.200}") from error


def _check_depth(text: str, loads: Any) -> None:
    """Check the depth of nesting by parser events alone, which takes no stack."""
    depth = 0
    for values, event in enumerate(yaml.parse(text, Loader=loads)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST or values > 2 * _MOST_VALUES:
            what = f"is nested more than {_DEEPEST} deep" if depth > _DEEPEST else "holds too many values"
            raise YamlTextError(f"{_line(event)}{what}")


def _line(marked: yaml.Event | yaml.Node) -> str:
    return f"line {marked.start_mark.line + 1}: " if marked.start_mark else ""


def _check_size(root: yaml.Node) -> None:
    """Count values and their characters as if every alias were written out."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise YamlTextError(f"{_line(node)}holds itself, by an alias")
        if known:
            return known
        sizes[id(node)] = None
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
                raise YamlTextError(
                    f"{_line(node)}a number has {len(node.value)} characters; at most {_LONGEST_NUMBER} are read"
                )
            total = 1 + len(node.value) // 100
        elif isinstance(node, yaml.MappingNode):
            total = 1 + sum(size(key) + size(value) for key, value in node.value)
        else:
            total = 1 + sum(map(size, node.value))
        if total > _MOST_VALUES:
            raise YamlTextError(
                f"{_line(node)}stands for more than {_MOST_VALUES} values once its aliases are written out"
            )
        sizes[id(node)] = total
        return total

    size(root)


def join_halves(value: Any) -> tuple[Any, list[Place]]:
    r"""Join the surrogate pairs of a value, such as JSON's `\ud83c\udf89`; also return the places of lone halves."""
    lone: list[Place] = []

    def joined(value: Any, place: Place) -> Any:
        if isinstance(value, str):
            try:
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                lone.append(place)
                return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if isinstance(value, dict):
            return {
                joined(key, (*place, str(key))): joined(held, (*place, key if isinstance(key, int) else str(key)))
                for key, held in value.items()
            }
        if isinstance(value, list):
            return [joined(held, (*place, index)) for index, held in enumerate(value)]
        return value

    return joined(value, ()), lone


class _Dumper(yaml.SafeDumper):
    """Writes texts that stand in curly quotes in straight ones, without which a config may not hold them."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if in_curly_quotes(data) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def write_yaml(value: Any) -> str:
    """Write a value as YAML that a config's reader takes, with keys in their order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
