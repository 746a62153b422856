"""The built-in domains of experts, `domains.yaml`, and which of them a model's name and card give away."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Final

from moemerge.config.yaml_text import read_yaml
from moemerge.drafting.cards import CardMetadata, words_of

GENERAL: Final = "assistant"
"""The domain of a model that is for everything."""
NONE: Final = "none"
"""What people write for no domain."""
# How much a word counts by where it stands: as a whole word, and at an end of a longer one.
_WEIGHTS: Final = {"name": (4, 3), "language": (3, 0), "tag": (2, 1), "data set": (2, 1)}
_SHORTEST_END: Final = 4
# Cards of models for all languages name many.
_MOST_LANGUAGES: Final = 2


@dataclass(frozen=True)
class Domain:
    """A kind of text, and prompts of people who want it."""

    words: tuple[str, ...]
    prompts: tuple[str, ...]
    languages: frozenset[str] = frozenset()
    general: bool = False


@dataclass(frozen=True)
class Guess:
    """A domain, and what gave it away."""

    domain: str
    reason: str


@dataclass(frozen=True)
class _Match:
    kind: str
    word: str
    weight: int
    reason: str


@cache
def all_domains() -> Mapping[str, Domain]:
    """Read the built-in domains by name."""
    text = (files("moemerge.drafting") / "domains.yaml").read_text(encoding="utf-8")
    table, _ = read_yaml(text)
    return {
        name: Domain(
            tuple(entry["words"]),
            tuple(entry["prompts"]),
            frozenset(entry.get("languages", ())),
            entry.get("general", False),
        )
        for name, entry in table.items()
    }


def domain_named(name: str) -> str | None:
    """The domain of a name, in any case of its letters; None for `none`.

    Raises:
        ValueError: there is no such domain; names the nearest, or all.
    """
    wanted = name.strip().lower()
    if wanted == NONE:
        return None
    if wanted in all_domains():
        return wanted
    near = get_close_matches(wanted[:60], all_domains(), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(all_domains())}, {NONE}."
    raise ValueError(f"{name[:60]!r} is not a domain. {hint}")


def guess_domain(card: CardMetadata, base: CardMetadata | None) -> Guess | None:
    """Find the domain that most speaks for; None where nothing does.

    Args:
        card: the model's name and card.
        base: the base's, whose words say nothing of an expert; None for the base itself.
    """
    found: dict[str, list[_Match]] = {}
    for name, domain in all_domains().items():
        common = {(match.kind, match.word) for match in _matches(domain, base)} if base else set()
        best: dict[str, _Match] = {}
        for match in _matches(domain, card):
            if (match.kind, match.word) not in common:
                best[match.kind] = max(best.get(match.kind, match), match, key=lambda one: (one.weight, len(one.word)))
        if best:
            found[name] = sorted(best.values(), key=lambda match: -match.weight)
    special = {name: matches for name, matches in found.items() if not all_domains()[name].general} or found
    if not special:
        return None

    def score(name: str) -> tuple[int, int]:
        matches = special[name]
        return sum(match.weight for match in matches), len(matches[0].word)

    chosen = max(special, key=score)
    return Guess(chosen, special[chosen][0].reason)


def _matches(domain: Domain, card: CardMetadata) -> Iterator[_Match]:
    """Yield each word of a domain that a model has, with where it stands."""
    yield from _in_text(domain, "name", card.name, f"its name is {card.name}")
    for tag in card.tags:
        yield from _in_text(domain, "tag", tag, f"its card has the tag {tag}")
    for data_set in card.data_sets:
        yield from _in_text(domain, "data set", data_set, f"its card names the data set {data_set}")
    others = card.languages - {"en"}
    if len(others) <= _MOST_LANGUAGES:
        for language in sorted(others & domain.languages):
            yield _Match("language", language, _WEIGHTS["language"][0], f"its card names the language {language}")


def _in_text(domain: Domain, kind: str, text: str, reason: str) -> Iterator[_Match]:
    whole, part = _WEIGHTS[kind]
    sequences = [f" {' '.join(words)} " for words in words_of(text)]
    tokens = {token for sequence in sequences for token in sequence.split()}
    for word in domain.words:
        if any(f" {word} " in sequence for sequence in sequences):
            yield _Match(kind, word, whole, reason)
        elif len(word) >= _SHORTEST_END and any(token.startswith(word) or token.endswith(word) for token in tokens):
            yield _Match(kind, word, part, reason)
