"""A draft as YAML with comments, to be edited by a person."""

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from moemerge.config.yaml_text import YamlTextError, read_yaml
from moemerge.drafting.draft import Draft, DraftExpert

SCHEMA_FILE: Final = "moemerge.schema.json"
"""Name of the JSON Schema beside a config."""
_WIDTH: Final = 100
_COLUMN: Final = 34
_FOLDED: Final = 90


def config_text(draft: Draft, name: str) -> str:
    """Write a draft as YAML.

    Args:
        draft: what to write.
        name: the file's name as a shell takes it, for the commands in its comments.
    """
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# A mixture of {len(draft.experts)} experts, begun by `moemerge init`. Change what you like, then:",
        f"#   moemerge plan {name}    # what a merge would do",
        f"#   moemerge {name} merged/",
        *_settings(draft),
        "experts:",
        *_comment(_about_prompts(draft), "  "),
    ]
    for expert in draft.experts:
        lines += _expert(draft, expert)
    return "\n".join(lines) + "\n"


def _settings(draft: Draft) -> Iterator[str]:
    count, chosen = len(draft.experts), draft.experts_per_token
    yield from _key("base_model", draft.base, "gives attention, embeddings, norms and the tokenizer")
    yield from _key("dtype", draft.dtype, "as the base is stored")
    if chosen == 1:
        per_token = f"of {count}; each token costs what one model does"
    elif chosen == count:
        per_token = f"all {count}: the router only weighs them, and each token costs what all of them do"
    else:
        per_token = f"of {count}; 1 measured as well on small models, at half of their FFNs' work (docs/recipes.md)"
    yield from _key("experts_per_token", chosen, per_token)
    if draft.averages:
        yield from _key(
            "shared_weights",
            "average",
            "attention and norms are the experts' mean, which measured better than the base's for fine-tunes of one "
            "model; where one of them changed attention much, base is better (docs/quality.md)",
        )
    if draft.unites:
        yield from _key(
            "tokenizer", "union", "with the tokens that experts added to the base's, and their rows (docs/config.md)"
        )
    if draft.vision:
        yield from _comment(f"keep_vision: true  # keeps the base's towers for images, too, in a {draft.vision}")
    if draft.is_random:
        yield from _key(
            "gate_mode", "random", "remove this line when every expert has prompts: random routers know nothing"
        )
    if draft.chats:
        yield from _comment("router: {chat_prompts: auto}  # if the mixture will mostly be asked in chats")


def _about_prompts(draft: Draft) -> str:
    if not draft.undescribed:
        return (
            "Prompts say what should be routed to an expert; its weights are read, too. Replace these by what your "
            "users write. Real text of its kind, some thousand tokens in `positive_texts: FILE`, measured better "
            "(docs/routers.md)."
        )
    names = ", ".join(expert.name for expert in draft.undescribed)
    if draft.is_random:
        return (
            f"{names}: no prompts that only it should answer yet, and the weights alone cannot make these routers. "
            "Give every expert some, and remove gate_mode."
        )
    return (
        "The weights alone make the routers; prompts for every expert, or texts, measured better (docs/recipes.md). "
        f"Every expert needs prompts or none has any, and {names}: none that only it should answer. To use prompts, "
        "give every expert some."
    )


def _expert(draft: Draft, expert: DraftExpert) -> Iterator[str]:
    yield f"  - source_model: {_scalar(expert.reference)}"
    yield f"    name: {_scalar(expert.name)}"
    if expert.domain:
        yield from _comment(f"domain {expert.domain}{f' ({expert.reason})' if expert.reason else ''}", "    ")
    prompts = [line for prompt in expert.prompts for line in _prompt(prompt)]
    if prompts and not draft.undescribed:
        yield "    positive_prompts:"
        yield from (f"      {line}".rstrip() for line in prompts)
        return
    if not prompts:
        yield from _comment("no prompts are known for it; they would stand here:", "    ")
    for line in ["positive_prompts:", *(f"  {line}" for line in prompts or ['- "..."'])]:
        yield f"    # {line}".rstrip()


def _key(key: str, value: Any, comment: str) -> Iterator[str]:
    """A key with a comment behind it, which goes on in the lines below."""
    start = f"{key}: {_scalar(value)}"
    column = max(_COLUMN, len(start) + 2)
    for number, line in enumerate(textwrap.wrap(comment, max(_WIDTH - column - 2, 40))):
        yield f"{'' if number else start:{column}}# {line}"


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _prompt(prompt: str) -> list[str]:
    """An entry of a list: a text with lines as they are, a long one folded, if YAML reads them back; else in quotes."""
    folded = textwrap.wrap(prompt, _FOLDED, break_long_words=False, break_on_hyphens=False)
    for sign, lines in (("|-", prompt.split("\n")), (">-", folded)):
        block = [f"- {sign}", *(f"  {line}".rstrip() for line in lines)]
        if len(lines) > 1 and _reads_as("\n".join(block), prompt):
            return block
    return [f"- {_quoted(prompt)}"]


def _reads_as(item: str, value: str) -> bool:
    try:
        return bool(read_yaml(f"{item}\n")[0] == [value])
    except YamlTextError:
        return False


def _scalar(value: Any) -> str:
    """A value as YAML, without quotes where it is read back without them."""
    if not isinstance(value, str):
        return str(value)
    return value if re.fullmatch(r"[\w./~+@ -]+", value) and _reads_as(f"- {value}", value) else _quoted(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())
