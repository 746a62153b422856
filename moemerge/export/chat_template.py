"""Find a model's chat template, and render it in jinja2's sandbox as transformers does."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError
from moemerge.export.vocabulary import read_table, text_of
from moemerge.passes.tokens import read_tokenizer_config
from moemerge.sources.remote_weights import TEMPLATES

if TYPE_CHECKING:
    from jinja2.ext import Extension

Messages = Sequence[tuple[str, str]]
"""Role and content of each message."""
Render = Callable[..., str]
"""A function from messages, and `ask` (whether an answer is to follow), to the text that a model reads.

It raises whatever errors the template raises.
"""
_FILE: Final = "chat_template.jinja"
_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
_MOST_CHARACTERS: Final = 200_000


def find_chat_template(folder: Path, settings: Mapping[str, Any], *, files_first: bool) -> str | list[Any] | None:
    """Find a folder's chat template, or several with names; None where there is none.

    Args:
        folder: the model's folder.
        settings: the model's `tokenizer_config.json`, which may hold a template, too.
        files_first: prefer templates in `.jinja` files, as transformers does and llama.cpp's converter does not.
            `chat_template.json`, a processor's, comes last either way.

    Raises:
        CheckpointError: a file is damaged.
        OSError: a file cannot be read.
        UnicodeDecodeError: a template is not text in UTF-8.
    """
    own = _templates_in_files(folder)
    if files_first and own is not None:
        return own
    other = read_table(folder / "chat_template.json").get("chat_template") if own is None else own
    found = settings.get("chat_template", other)
    return found if isinstance(found, str | list) else None


def _templates_in_files(folder: Path) -> str | list[Any] | None:
    file = folder / _FILE
    if not file.is_file():
        return None
    default = file.read_text(encoding="utf-8")
    others = [(path.stem, path.read_text(encoding="utf-8")) for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    if not others:
        return default
    return [{"name": name, "template": text} for name, text in [("default", default), *others]]


def read_chat_template(folder: Path) -> str:
    """Read the chat template that transformers uses, of several the default; empty if none can be read."""
    try:
        found = find_chat_template(folder, read_tokenizer_config(folder), files_first=True)
    except (OSError, UnicodeDecodeError, CheckpointError):
        return ""
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found[:_MOST_CHARACTERS] if isinstance(found, str) else ""


def special_tokens(folder: Path) -> dict[str, str]:
    """Read the texts of a tokenizer's BOS, EOS, padding and unknown tokens, as far as it has them."""
    config = read_tokenizer_config(folder)
    return {name: text for name in _TOKENS if (text := text_of(config.get(name))) is not None}


def added_tokens(folder: Path) -> dict[int, str]:
    """Read the texts of tokens that a tokenizer adds to its vocabulary, by id."""
    entries: list[tuple[Any, Any]] = []
    try:
        listed = read_json(folder / "tokenizer.json").get("added_tokens")
        entries += [(one.get("id"), one.get("content")) for one in listed or () if isinstance(one, dict)]
    except CheckpointError:
        pass
    decoder = read_tokenizer_config(folder).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries += [
            (int(key), one.get("content")) for key, one in decoder.items() if key.isdecimal() and isinstance(one, dict)
        ]
    return {id_: text for id_, text in entries if isinstance(id_, int) and isinstance(text, str)}


def renderer(template: str, tokens: Mapping[str, str]) -> Render:
    """Make a function that renders a chat template.

    Args:
        template: the chat template, in Jinja.
        tokens: texts of special tokens that the template may use, by name.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)  # noqa: DTZ005  as the user's clock
    environment.filters["tojson"] = _as_json
    return partial(_render, environment.from_string(template), dict(tokens))


def _render(template: Any, tokens: Mapping[str, str], messages: Messages, *, ask: bool = True) -> str:
    given = [{"role": role, "content": content} for role, content in messages]
    text: str = template.render(messages=given, add_generation_prompt=ask, tools=None, documents=None, **tokens)
    return text


def _refuse(message: object = "") -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _as_json(value: object, **options: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=options.get("indent"))


def _generation_tag() -> "type[Extension]":
    """The tag with which templates mark what an assistant says; it does not change the text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  as jinja2 has it

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation
