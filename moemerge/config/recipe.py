"""A recipe: a merge config in which values may be open, checked completely before anything of it is tried."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from moemerge.config.cross_checks import unused_settings
from moemerge.config.loading import not_named, parse_config, read_document, read_text
from moemerge.config.local_paths import with_paths_from
from moemerge.config.problems import PlacedError, repeated_keys
from moemerge.config.recipe_points import Choice, LeftOut, Point, PointReader, Range
from moemerge.config.schema import MergeConfig
from moemerge.config.tokenizer_choice import BASE
from moemerge.config.typography import curly_quotes
from moemerge.config.yaml_text import write_yaml
from moemerge.errors import ConfigError
from moemerge.places import Place, address

Ask = Callable[[Point], float]
"""A function from an open value to a number in its range, or to the number of one of its options."""
# Lists with an entry for each expert.
_BY_EXPERT: Final = (("shared_weights", "weights"), ("router", "load_prior"))
_EXPERTS: Final = ("experts",)
_DIGITS: Final = 4
_TOKENIZER: Final = (
    "a search reads text with the base model's tokenizer, since losses of other tokens do not compare. Leave it out "
    "here, and set it in the config that is found"
)
_VISION: Final = "a search runs the text model alone. Leave it out here, and set it in the config that is found"
_AUTO: Final = "auto is chosen by losses when a merge begins; a search tries methods itself: [base, average, ties]"


@dataclass(frozen=True)
class Made:
    """A merge config's document that was made of a recipe."""

    document: dict[str, Any]
    values: Mapping[str, str]
    """The values that were open, by their address in the recipe."""
    asked: tuple[Point, ...]
    """The open values on the way, in order."""
    origins: Mapping[Place, Place]
    """Places in the document whose place in the recipe is another."""

    @property
    def key(self) -> str:
        """A text that is equal for equal documents."""
        return write_yaml(self.document)

    def origin(self, place: Place) -> Place:
        """Find the place in the recipe of a place in the document."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.origins:
                return (*self.origins[place[:length]], *place[length:])
        return place


@dataclass(frozen=True)
class Recipe:
    """A merge config in which values may be open."""

    name: str
    """What messages call it."""
    folder: Path
    """The folder of its file, from which relative paths count."""
    document: Mapping[str, Any]
    """The document, with `Choice` and `Range` in the place of open values."""
    node: yaml.Node | None
    """The root of the file's YAML, which knows lines."""

    def make(self, ask: Ask) -> Made:
        """Make a merge config's document, with the values that `ask` gives."""
        return _Maker(ask).make(self.document)

    def first(self) -> Made:
        """Make the document of all first options and lower bounds."""
        return self.make(first_of)

    def config(self, made: Made) -> MergeConfig:
        """Read a document that was made of this recipe as a merge config.

        Raises:
            ConfigError: its values do not go together.
        """
        return parse_config(made.key, self.name, self.folder)

    def refusal(self, made: Made, placed: Iterable[tuple[Place, str]]) -> PlacedError:
        """Make an error of problems in a document that was made of this recipe, with the recipe's lines."""
        return PlacedError([(made.origin(place), problem) for place, problem in placed], self.name, self.node)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe, and check every one of its options as a merge config is checked.

    Raises:
        ConfigError: lists every problem with its address and line.
    """
    name, text = str(path), read_text(path)
    document, node = read_document(text, name)
    reader = PointReader()
    read = reader.read(document)
    problems = [*repeated_keys(node), *curly_quotes(node), *not_named(document), *reader.problems]
    if problems:  # others follow from them
        raise PlacedError(problems, name, node)
    recipe = Recipe(name, path.parent, read, node)
    if not recipe.first().asked:
        raise ConfigError(
            f"{name}: nothing is open in it, so there is nothing to search. Write choices or ranges, such as "
            "`experts_per_token: [1, 2]` or `router: {scale: {log: [0.5, 4]}}`; `moemerge merge` merges it as it is.",
            [],
        )
    if found := _problems(recipe):
        raise PlacedError(found, name, node)
    return recipe


def first_of(point: Point) -> float:
    """The first option of a choice, or the lower bound of a range."""
    return point.low if isinstance(point, Range) else 0


def _problems(recipe: Recipe) -> list[tuple[Place, str]]:
    """Check the first options, and each other option beside these; returns every problem with its place.

    A problem at another open value is none of the option's, since another value may go with it.
    """
    found: dict[tuple[Place, str], None] = {}
    seen: set[Place] = set()
    waiting: deque[dict[Place, float]] = deque([{}])
    while waiting:
        forced = waiting.popleft()
        made = recipe.make(lambda point, forced=forced: forced.get(point.place, first_of(point)))  # type: ignore[misc]
        places = {point.place for point in made.asked}
        own = list(forced)[-1] if forced else ()
        for place, problem in _wrong(recipe, made):
            if place[: len(own)] == own or not any(place[: len(other)] == other for other in places):
                found[place, problem] = None
        for point in made.asked:
            if point.place not in seen:
                waiting += [{**forced, point.place: value} for value in point.alternatives]
        seen |= places
    return list(found)


def _wrong(recipe: Recipe, made: Made) -> Iterator[tuple[Place, str]]:
    document, problems = with_paths_from(made.document, recipe.folder)
    try:
        config = MergeConfig(**document)
    except PlacedError as error:
        problems += error.placed
    else:
        problems += [(("shared_weights",), _AUTO)] * config.shared_weights.is_open
        if config.vocabulary != BASE:
            key = "tokenizer" if config.tokenizer != BASE else "tokenizer_source"
            problems.append(((key,), _TOKENIZER))
        problems += [(("keep_vision",), _VISION)] * config.keep_vision
    for place, problem in problems:
        yield made.origin(place), problem


class _Maker:
    """Makes one document of a recipe."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._asked: list[Point] = []
        self._values: dict[str, str] = {}
        self._origins: dict[Place, Place] = {}
        self._open: set[Place] = set()
        self._kept: list[int] = []
        self._depth = 0

    def make(self, document: Mapping[str, Any]) -> Made:
        whole = self._keys(document, ())
        experts = document.get("experts")
        _drop_entries(whole, len(experts) if isinstance(experts, list) else 0, self._kept)
        for place in unused_settings(whole):
            if place in self._open:  # one that is written without a choice is refused
                del whole[str(place[0])][place[1]]
        return Made(whole, self._values, tuple(self._asked), self._origins)

    def _made(self, value: Any, place: Place) -> Any:
        if isinstance(value, Choice | Range):
            return self._chosen(value, place)
        if isinstance(value, dict):
            return self._keys(value, place)
        if isinstance(value, list):
            return self._experts(value) if place == _EXPERTS else self._elements(value, place)
        return value

    def _elements(self, values: list[Any], place: Place) -> list[Any]:
        return [self._made(value, (*place, index)) for index, value in enumerate(values)]

    def _experts(self, experts: list[Any]) -> list[Any]:
        """Make the experts; those that follow one that is left out move up."""
        kept: list[Any] = []
        for number, expert in enumerate(experts):
            place = (*_EXPERTS, len(kept))
            made = self._made(expert, place)
            if not isinstance(made, LeftOut):
                self._origins[place] = (*_EXPERTS, number)
                self._kept.append(number)
                kept.append(made)
        return kept

    def _keys(self, value: Mapping[str, Any], place: Place) -> dict[str, Any]:
        return {key: self._made(held, (*place, key)) for key, held in value.items()}

    def _chosen(self, point: Point, place: Place) -> Any:
        self._asked.append(point)
        self._open.add(place)
        number = self._ask(point)
        self._depth += 1
        if isinstance(point, Range):
            self._origins[place] = point.place
            made: Any = int(number) if point.whole else float(f"{number:.{_DIGITS}g}")
        else:
            option = point.options[int(number)]
            self._origins[place] = option.place
            made = self._made(option.value, place)
        self._depth -= 1
        if not self._depth:
            self._values[address(point.place)] = _shown(point, made)
        return made


def _shown(point: Point, made: Any) -> str:
    if any(isinstance(option.value, LeftOut) for option in getattr(point, "options", ())):
        return "no" if isinstance(made, LeftOut) else "yes"
    written = yaml.safe_dump(made, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return written.removesuffix("\n").removesuffix("\n...")


def _drop_entries(document: dict[str, Any], experts: int, kept: list[int]) -> None:
    """Leave out the entries of experts that are left out, in lists with one for each expert."""
    for group, key in _BY_EXPERT:
        held = document.get(group)
        entries = held.get(key) if isinstance(held, dict) else None
        if isinstance(entries, list) and len(entries) == experts:
            document[group][key] = [entries[number] for number in kept]
