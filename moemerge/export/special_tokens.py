"""Tokens with a role, whether texts begin or end with them, and chat templates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moemerge.export.chat_template import find_chat_template
from moemerge.export.vocabulary import NAMED, read_table, text_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

_TEMPLATE_NAMES: Final = "tokenizer.chat_templates"


@dataclass
class SpecialTokens:
    """The special tokens of a model, as the files in its folder give them."""

    ids: dict[str, int] = field(default_factory=dict)
    """Token ids by role: bos, eos and so on."""
    added: dict[str, bool] = field(default_factory=dict)
    """Whether a token is put before or behind every text, by role; where a role is absent, engines have defaults."""
    chat_template: Any = None
    """The chat template, or several with names."""

    def add_to(self, writer: "GGUFWriter") -> None:
        """Add the tokens and the chat templates to a file."""
        for name, number in self.ids.items():
            if name != "cls":  # GGUF has no place for it
                getattr(writer, f"add_{name}_token_id")(number)
        for name, value in self.added.items():
            getattr(writer, f"add_add_{name}_token")(value)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
            names = writer.kv_data[0].get(_TEMPLATE_NAMES)
            if names is not None:
                names.value = sorted(names.value)  # the package's order is another in every process


def read_special_tokens(folder: Path, config: Mapping[str, Any], size: int) -> SpecialTokens:
    """Read the special tokens from a tokenizer's files, and from `config.json` where those are silent.

    Args:
        folder: the model's folder.
        config: the model's `config.json`.
        size: the size of the vocabulary; tokens beyond it are left out.

    Raises:
        CheckpointError: a file is damaged.
    """
    tokenizer = read_table(folder / "tokenizer.json")
    settings = read_table(folder / "tokenizer_config.json")
    found = SpecialTokens()
    texts = {name: text_of(settings.get(f"{name}_token")) for name in NAMED} if settings else dict.fromkeys(NAMED)
    if tokenizer:
        texts["bos"], texts["eos"] = texts["bos"] or texts["cls"], texts["eos"] or texts["sep"]
        processor = tokenizer.get("post_processor") or {}
        for step in processor.get("processors", [processor]):
            _read_step(step, texts, found.added)
    if settings:
        for name in texts:
            declared = settings.get(f"add_{name}_token")
            if isinstance(declared, bool):
                found.added.setdefault(name, declared)
        numbers = {entry["content"]: entry["id"] for entry in reversed(tokenizer.get("added_tokens") or [])}
        ids = {name: numbers.get(text) for name, text in texts.items() if text is not None}
        found.ids = {name: number for name, number in ids.items() if number is not None and number < size}
        found.chat_template = find_chat_template(folder, settings, files_first=False)  # as the converter
    for name in texts:
        number = config.get(f"{name}_token_id")
        if isinstance(number, int) and 0 <= number < size:
            found.ids.setdefault(name, number)
    return found


def _read_step(step: Mapping[str, Any], texts: dict[str, str | None], added: dict[str, bool]) -> None:
    """Read which tokens one step of a `post_processor` puts around texts."""
    if step.get("type") == "ByteLevel":
        added.setdefault("bos", False)
        added.setdefault("eos", False)
    elif step.get("type") == "RobertaProcessing":
        added.update(bos=True, eos=True, sep=True)
        for name in ("cls", "sep"):
            texts[name] = texts[name] or (step.get(name) or [None])[0]
    elif step.get("type") == "TemplateProcessing":
        first, last = _ends(step.get("single") or [])
        if first is not None:
            texts["bos"], texts["cls"] = texts["bos"] or first, texts["cls"] or first
            added["bos"] = first in {texts["bos"], texts["cls"]}
        if last is not None:
            if last != texts["eos"]:
                # What ends a text is not what ends a turn.
                texts["eot"], texts["eos"] = texts["eos"], last
            added["eos"] = True
        _read_pair(step.get("pair") or [], (first, last), texts, added)


def _ends(template: list[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The special tokens before and after a text."""
    if len(template) < 2:  # noqa: PLR2004
        return None, None
    return _special(template[0]), _special(template[-1])


def _special(entry: Mapping[str, Any]) -> str | None:
    found = entry.get("SpecialToken", {}).get("id")
    return found if isinstance(found, str) else None


def _read_pair(
    pair: list[Mapping[str, Any]],
    ends: tuple[str | None, str | None],
    texts: dict[str, str | None],
    added: dict[str, bool],
) -> None:
    """Read whether a separator is put between two texts."""
    first, last = ends
    if pair and first and _special(pair[0]) == first:
        pair = pair[1:]
    if pair and last and _special(pair[-1]) == last:
        pair = pair[:-1]
    between = pair[1:-1]
    if not between or pair[0].get("Sequence", {}).get("id") != "A" or pair[-1].get("Sequence", {}).get("id") != "B":
        return
    separators = {texts["sep"], texts["eos"]} - {None}
    added["sep"] = (_special(between[0]) in separators and not last) or (
        len(between) == 2 and _special(between[1]) in separators  # noqa: PLR2004
    )
    if added["sep"]:
        texts["sep"] = texts["sep"] or texts["eos"]
