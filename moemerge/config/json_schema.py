"""The JSON Schema of a merge config, for editors: made from the config's types, and published as `schema.json`."""

from importlib.resources import files
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema

from moemerge.config.chat_prompts import MESSAGES_SCHEMA, PROMPT_SCHEMA
from moemerge.config.schema import MergeConfig

# Parts that are written once.
_NAMED: Final = {"Prompt": PROMPT_SCHEMA, "Messages": MESSAGES_SCHEMA}
# The names that pydantic gives to bounds of what a function has checked before.
_BOUNDS: Final = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}


class _Untitled(GenerateJsonSchema):
    """A generator without a title for each key, which would be the key again."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  pydantic's
        return False


def published_schema() -> str:
    """Read `schema.json`, which another pydantic might make in other words."""
    return (files("moemerge.config") / "schema.json").read_text(encoding="utf-8")


def config_schema() -> dict[str, Any]:
    """Make the JSON Schema (draft 2020-12) of a merge config.

    Whatever the loader accepts is valid under it. The loader refuses more, since it also compares keys with each other.
    """
    made = MergeConfig.model_json_schema(by_alias=True, schema_generator=_Untitled)
    definitions = {name: _referring(part) for name, part in made.pop("$defs").items()}
    definitions |= {name: {key: _referring(held) for key, held in part.items()} for name, part in _NAMED.items()}
    for model in (made, *definitions.values()):
        model.pop("title", None)
        if "description" in model:
            model["description"] = model["description"].partition("\n\n")[0]
    head = {"$schema": GenerateJsonSchema.schema_dialect, "title": "Merge config of moemerge"}
    return {**head, **_referring(made), "$defs": dict(sorted(definitions.items()))}


def _referring(schema: Any) -> Any:
    """Replace each named part of a schema by a reference to it, and name bounds as JSON Schema does."""
    for name, part in _NAMED.items():
        if schema == part:
            return {"$ref": f"#/$defs/{name}"}
    if isinstance(schema, dict):
        return {_BOUNDS.get(key, key): _referring(held) for key, held in schema.items()}
    return [_referring(held) for held in schema] if isinstance(schema, list) else schema
