"""Whose vocabulary a merged model has: the key `tokenizer`, and `tokenizer_source`, as mergekit calls it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from moemerge.config.expert_names import expert_names
from moemerge.places import Place

BASE: Final = "base"
UNION: Final = "union"
_EXPERT: Final = "expert "
KEYS: Final = ("tokenizer", "tokenizer_source")
"""The key, and mergekit's word for it."""
_KNOWN: Final = "base, union, or expert NAME with an expert's name"


def _read_choice(value: Any) -> Any:
    """Read a choice in any of its spellings."""
    value = _source_of(value)
    if value is None:
        return BASE
    if isinstance(value, dict):
        raise ValueError(f"expected {_KNOWN}: rows of single tokens cannot be chosen")  # noqa: TRY004  pydantic's
    if not isinstance(value, str) or not (value in {BASE, UNION} or named_expert(value)):
        raise ValueError(f"expected {_KNOWN}")
    return value


_Words = Literal["base", "union"] | Annotated[str, Field(pattern=r"^expert +\S.*$")]
_Source = Annotated[dict[Literal["source"], _Words], Field(min_length=1)]
TokenizerChoice = Annotated[str, BeforeValidator(_read_choice, json_schema_input_type=_Words | _Source | None)]
"""`base`, `union` or `expert NAME`."""


def named_expert(choice: str) -> str:
    """The name in `expert NAME`; empty in any other choice."""
    return choice.removeprefix(_EXPERT).strip() if choice.startswith(_EXPERT) else ""


def tokenizer_problems(document: Mapping[str, Any], experts: Sequence[Mapping[str, Any]]) -> list[tuple[Place, str]]:
    """List experts that a choice names and the config does not have, and a choice that is made twice."""
    chosen = {key: _source_of(document.get(key)) for key in KEYS}
    given = {key: word for key, word in chosen.items() if isinstance(word, str) and word != BASE}
    if len(given) > 1:
        return [((KEYS[1],), f"is another name of {KEYS[0]}: keep one of them")]
    models = [model for expert in experts if isinstance(model := expert.get("source_model"), str)]
    if not given or len(models) < len(experts):
        return []
    names = expert_names(models, [name if isinstance(name := e.get("name"), str) else None for e in experts])
    ((key, word),) = given.items()
    wanted = named_expert(word)
    if not wanted or wanted in names:
        return []
    return [((key,), f"names no expert, found {wanted!r:.60}; the experts are {', '.join(names)}")]


def _source_of(value: Any) -> Any:
    """The word in `{source: word}`, as mergekit's newer configs write it; anything else as it is."""
    return value["source"] if isinstance(value, dict) and value.keys() == {"source"} else value
