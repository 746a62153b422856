"""Prove on a text that a merged model's tokenizer gives the base's ids, or make a tokenizer.json with which it does.

transformers chooses a tokenizer's class by `model_type` too, which differs in the merged model. As a program
(`python -m moemerge.passes.proving BASE OUT`) it writes what it found to `proof.json` beside OUT, and reads the tokens
that the output has beside the base's from `added.json` there.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from moemerge.passes.tokens import auto_tokenizer, error_line, why_unreadable

RESULT: Final = "proof.json"
ADDED: Final = "added.json"
Entries = Sequence[Mapping[str, Any]]
"""Added tokens as a tokenizer.json lists them, in the order of their ids."""
_SETTINGS: Final = ("single_word", "lstrip", "rstrip", "normalized")
# Text that nearly equal tokenizers treat differently: spaces at the ends and in runs, digits, contractions, marks
# that join letters, scripts without spaces, what no vocabulary holds.
TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces before,\n\n  and\tbetween  words \r\n and behind  ",
    " a",
    "a",
    "",
    "\n",
    "▁x_y",
    "I'm sure WE'LL say it's 3.14, 1,000 or 20240229; don't you?",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # <b>\n\n\n\tdone()",
    "Größe naïve cafe\u0301 ½ ﬁ Straße Привет, мир! Ελλάδα",
    "你好,世界。 こんにちは 안녕하세요 مرحبا नमस्ते क्षि ไทย",
    "🙂🚀 👩\u200d👩\u200d👧 \u00a0\u2009\ufeff\x07",
    "<s>[INST] hi [/INST]</s> <|im_start|>user\nhi<|im_end|><bos><unk><pad><|endoftext|>",
)
_MOST_ADDED: Final = 200
_NAMED: Final = ("bos_token", "eos_token", "pad_token")
_SIDES: Final = ("padding_side", "truncation_side")
# This class makes transformers 4 and 5 read tokenizer.json as it is, where they heed it.
_AS_IT_IS: Final = {"tokenizer_class": "PreTrainedTokenizerFast"}
_VOCABULARY: Final = "the id of"
_TEMPLATE: Final = "its chat_template"
_ABSENT: Final = object()
# Settings of added tokens that a class ignored when it read the base, and would heed in a tokenizer.json.
_ADDED_AS_MADE: Final = {"added_tokens_decoder": _ABSENT}


@dataclass(frozen=True)
class Proof:
    """The result, as text that can be stored."""

    base_class: str = ""
    """The class that reads the base's tokenizer; empty where it cannot be read."""
    problem: str = ""
    """The reason why it cannot be read, or how the output differs; where ids are proved, how plain copies differ."""
    step: str = ""
    """The next step for the user where it cannot be read."""
    output_class: str = ""
    """The class that reads the output's tokenizer then; empty where it cannot be read."""
    is_proved: bool = False
    """Whether the output gives the base's ids."""


def prove(base: Path, out: Path, added: Entries | None = None) -> Proof:
    """Find out whether an output's tokenizer gives the base's ids, and make it so where it does not.

    Both tokenizers, as transformers makes them of their folders, read a few texts.

    Args:
        base: the base model's folder.
        out: a folder with the output's `config.json` and the files copied from the base. Where these are not enough,
            `tokenizer.json` is made anew here from the base's tokenizer, and `tokenizer_config.json` edited.
        added: tokens that the output has beside the base's, and then a chat template of its own; None where there is no
            such difference.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes, about texts that a user did not write
        return _prove(base, out, added)


def _prove(base: Path, out: Path, added: Entries | None) -> Proof:
    try:
        tokenizer = auto_tokenizer(base)
        _add(tokenizer, added or ())
        converted, texts = _converted(tokenizer), _texts(tokenizer)
        expected = _read(tokenizer, texts)
        if added is not None:
            del expected[_TEMPLATE]
            expected[_VOCABULARY] |= {entry["content"]: entry["id"] for entry in added}
    except Exception as error:  # noqa: BLE001  each tokenizer class raises in its own way
        return Proof("", *why_unreadable(base, error))
    compare = partial(_compare, out, texts, expected, type(tokenizer).__name__)
    found = compare()
    if found.is_proved and (out / "tokenizer.json").is_file():
        return found
    made = (out / "tokenizer.json", out / "tokenizer_config.json")
    copied = {path: path.read_bytes() for path in made if path.is_file()}
    last = found
    for edits in _edits(tokenizer) if converted else ():
        made[0].write_text(converted, encoding="utf-8")
        _edit_config(made[1], copied.get(made[1]), edits)
        last = compare()
        if last.is_proved:
            return replace(found, is_proved=True)
    for path in made:
        path.unlink(missing_ok=True)
    for path, content in copied.items():
        path.write_bytes(content)
    return found if found.is_proved else last


def _add(tokenizer: Any, added: Entries) -> None:
    """Add tokens to a tokenizer as transformers does it."""
    from tokenizers import AddedToken

    for entry in added:
        settings = {key: entry[key] for key in _SETTINGS if key in entry}
        token = AddedToken(entry["content"], special=bool(entry.get("special")), **settings)
        tokenizer.add_tokens([token], special_tokens=bool(entry.get("special")))


def _converted(tokenizer: Any) -> str:
    """Write a tokenizer as the text of a tokenizer.json; empty where that is not possible."""
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        text: str = (convert_slow_tokenizer(tokenizer) if backend is None else backend).to_str(pretty=True)
    except Exception:  # noqa: BLE001  each converter raises in its own way
        return ""
    return text


def _texts(tokenizer: Any) -> list[str]:
    """The texts that the tokenizer can read: Code Llama's divides a text at its token for what is to be filled in."""
    added = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})[:_MOST_ADDED]
    texts = []
    for text in (*TEXTS, *(f"a{token}b {token} c{token}\n" for token in added)):
        with suppress(ValueError):
            tokenizer(text, verbose=False)
            texts.append(text)
    if not texts:
        raise ValueError("it reads no text")
    return texts


def _read(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Collect what a tokenizer makes of texts, and its other settings that decide on a model's ids, by name."""
    alone = {"add_special_tokens": False, "verbose": False}
    return {
        **{f"the ids of {text!r:.80}": tokenizer(text, verbose=False)["input_ids"] for text in texts},
        **{f"the ids without special ones of {text!r:.80}": tokenizer(text, **alone)["input_ids"] for text in texts},
        **{f"its {name}": getattr(tokenizer, f"{name}_id") for name in _NAMED},
        _VOCABULARY: tokenizer.get_vocab(),
        _TEMPLATE: tokenizer.chat_template,
        "its model_input_names": list(tokenizer.model_input_names),
        **{f"its {name}": getattr(tokenizer, name, None) for name in _SIDES},
    }


def _compare(out: Path, texts: Sequence[str], expected: Mapping[str, Any], base_class: str) -> Proof:
    """Find the first thing in which the output's tokenizer differs from what is expected, if there is one."""
    try:
        tokenizer = auto_tokenizer(out)
        found = _read(tokenizer, texts)
    except Exception as error:  # noqa: BLE001  each tokenizer class raises in its own way
        return Proof(base_class, f"it cannot be loaded ({error_line(error)})")
    name = type(tokenizer).__name__
    for what, value in expected.items():
        if found[what] != value:
            place, ours, theirs = _first(what, found[what], value)
            problem = f"{place}: {ours!r:.80} by {name}, {theirs!r:.80} by the base's {base_class}"
            return Proof(base_class, problem, output_class=name)
    return Proof(base_class, output_class=name, is_proved=True)


def _first(what: str, found: Any, expected: Any) -> tuple[str, Any, Any]:
    """Find where two values differ first, and what each has there."""
    if isinstance(found, dict) and isinstance(expected, dict):
        key = next((key for key in (*expected, *found) if expected.get(key) != found.get(key)), "")
        return f"{what} {key!r:.60}", found.get(key), expected.get(key)
    if isinstance(found, list) and isinstance(expected, list):
        pairs = enumerate(zip(found, expected, strict=False))
        start = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(found), len(expected)))
        return f"{what} from {start} on", found[start : start + 4], expected[start : start + 4]
    return what, found, expected


def _edits(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield additions to tokenizer_config.json for a made tokenizer.json, the fewest first; `_ABSENT` removes a key."""
    sides = {name: "left" for name in _SIDES if getattr(tokenizer, name, None) == "left"}
    named = {name: getattr(tokenizer, name) for name in _NAMED}
    named["model_input_names"] = list(tokenizer.model_input_names)
    for edits in (sides, sides | named, sides | named | _AS_IT_IS):
        yield edits
        yield edits | _ADDED_AS_MADE


def _edit_config(path: Path, copied: bytes | None, edits: Mapping[str, Any]) -> None:
    config = json.loads(copied or b"{}")
    edited = {key: value for key, value in (config | edits).items() if value is not _ABSENT}
    edited.pop("fast_tokenizer_files", None)  # it names files that are read in place of tokenizer.json
    content = json.dumps(edited, indent=2).encode() + b"\n"
    if edited != config:
        path.write_bytes(content)
    elif copied:
        path.write_bytes(copied)


if __name__ == "__main__":
    _base, _out = map(Path, sys.argv[1:])
    _tokens = _out.with_name(ADDED)
    _added = json.loads(_tokens.read_text(encoding="utf-8")) if _tokens.is_file() else None
    _out.with_name(RESULT).write_text(json.dumps(asdict(prove(_base, _out, _added))), encoding="utf-8")
