"""Write a Modelfile for Ollama from a model's chat template, tokens and settings, and run `ollama create` with it."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.disk import drafted
from moemerge.checkpoint.gguf_contents import GgufContents, read_contents
from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError, OutputError, RefusedError
from moemerge.export.chat_format import ChatFormat, read_format
from moemerge.export.chat_template import added_tokens, read_chat_template, special_tokens
from moemerge.families.splitting import ADD_BOS
from moemerge.printable import printable

# Ollama's name of a parameter, by the key of generation_config.json.
_PARAMETERS: Final = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
# Kinds of tokenizers that put a BOS in front where the file does not say.
_WITH_BOS: Final = {"llama"}
_ALWAYS_WITH_BOS: Final = "gemma4"
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+){0,2}(:[\w.-]+)?")
_QUOTES: Final = '"""'
_ERROR_BYTES: Final = 300


@dataclass(frozen=True)
class WrittenModelfile:
    """A Modelfile that was written."""

    path: Path
    template: str
    """The template in Go; empty where there is none."""
    stops: tuple[str, ...]
    """Texts at which an answer ends."""
    notes: tuple[str, ...]


def check_name(name: str) -> None:
    """Refuse a name that Ollama does not take for a model.

    Raises:
        RefusedError: the name is not valid.
    """
    if not _NAME.fullmatch(name):
        raise RefusedError(
            f"--ollama {name}: is not a model's name for Ollama. Expected letters, digits, `.`, `-` and `_`, such as "
            "my-mixture, user/my-mixture or my-mixture:q4."
        )


def check_modelfile(path: Path, *, overwrite: bool) -> None:
    """Refuse to overwrite a Modelfile that is there.

    Raises:
        RefusedError: it exists, and is not to be replaced.
    """
    if path.exists() and not (overwrite and path.is_file()):
        raise RefusedError(
            f"{path}: exists, and --ollama writes one. Replace it with --overwrite, or name a file in another folder."
        )


def write_modelfile(folder: Path, gguf: Path, out: Path) -> WrittenModelfile:
    """Write the Modelfile for a GGUF file.

    Args:
        folder: the model's folder, with its chat template, tokenizer and generation_config.json.
        gguf: the GGUF file.
        out: the Modelfile to write, which is replaced.

    Raises:
        SourceError: the GGUF file cannot be read.
        CheckpointError: the GGUF file is damaged.
        OutputError: the Modelfile cannot be written.
        RefusedError: the GGUF file's name cannot be written in a Modelfile.
    """
    found, notes = _format(folder, read_contents(gguf))
    template = found.go_template() if found else ""
    if lost := _unwritable(template):
        template = ""
        notes.append(f"TEMPLATE is left out: the chat template holds {lost}, which a Modelfile cannot")
    stops = tuple(_stops(folder, found))
    lines = [f"FROM {_reference(gguf, out)}"]
    if template:
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in _settings(folder)]
    try:
        with drafted(out) as draft:
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}.") from error
    return WrittenModelfile(out, template, stops, tuple(notes))


def create(name: str, modelfile: Path) -> str:
    """Let Ollama make a model of a Modelfile, if Ollama is installed; returns a line about what to do next.

    Raises:
        RefusedError: the name is not valid.
        OutputError: Ollama fails to make the model.
    """
    check_name(name)
    program = shutil.which("ollama")
    if program is None:
        return f"ollama is not on the PATH; where it is: ollama create {name} -f {modelfile} && ollama run {name}"
    try:
        done = subprocess.run(  # noqa: S603  the user asked for it
            [program, "create", name, "-f", str(modelfile)], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError as error:
        raise OutputError(f"{program}: cannot be run: {error.strerror or error}.") from error
    if done.returncode:
        said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        why = printable(said[-1].rstrip("."), _ERROR_BYTES) if said else f"it ends with code {done.returncode}"
        raise OutputError(
            f"ollama create {name} -f {modelfile}: {why}. Is `ollama serve` running? The file is complete; run the "
            "command again."
        )
    return f"ollama run {name}"


def _format(folder: Path, model: GgufContents) -> tuple[ChatFormat | None, list[str]]:
    """Find the format of the model's chats, with notes on it."""
    template = read_chat_template(folder)
    if not template:
        return None, ["TEMPLATE is left out: the model has no chat template; Ollama gives it each text as it is"]
    tokens = special_tokens(folder)
    bos = tokens.get("bos_token", "") if puts_bos(model) else ""
    found = read_format(template, tokens, bos, tokens.get("eos_token", ""))
    if found is None:
        return None, [
            "TEMPLATE is left out: what the chat template writes is not a plain sequence of turns. Ollama may know the "
            "template by itself; `ollama show --template` says which it took"
        ]
    notes = []
    if not found.knows_system:
        notes.append("the chat template takes no system message: TEMPLATE puts one in front of the first question")
    if "strftime_now" in template:
        notes.append("the chat template may write today's date: where it does, TEMPLATE has the day it was made on")
    return found, notes


def puts_bos(model: GgufContents) -> bool:
    """Whether llama.cpp puts a BOS in front of every text of a model."""
    said, split = (model.settings.get(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "pre"))
    if said is not None and split != _ALWAYS_WITH_BOS:
        return bool(said)
    return split == _ALWAYS_WITH_BOS or model.settings.get("tokenizer.ggml.model") in _WITH_BOS or split in ADD_BOS


def _unwritable(template: str) -> str:
    """Name what Ollama's reader of Modelfiles ends a template at, or drops from it; empty if it has none of that."""
    if _QUOTES in template:
        return _QUOTES
    return next((ascii(sign) for sign in template if not sign.isprintable() and sign not in "\n\t"), "")


def _stops(folder: Path, found: ChatFormat | None) -> Iterator[str]:
    """Yield texts at which an answer ends: tokens that end a text, and those around turns."""
    added = added_tokens(folder)
    special = set(added.values()) | set(special_tokens(folder).values())
    texts = [*_ends(folder, added)]
    if found:
        for text in (found.assistant[1], found.user[0], found.system[0] if found.place == "own turn" else ""):
            texts += _tokens_in(text, special) or [text.strip()]
    seen = dict.fromkeys(text for text in texts if text and '"' not in text and "\n" not in text)
    yield from seen


def _ends(folder: Path, added: dict[int, str]) -> Iterator[str]:
    """Yield tokens that end a text, by generation_config.json and by the tokenizer."""
    ids = _read(folder / "generation_config.json").get("eos_token_id")
    for id_ in ids if isinstance(ids, list) else [ids]:
        if isinstance(id_, int) and id_ in added:
            yield added[id_]
    if end := special_tokens(folder).get("eos_token"):
        yield end


def _tokens_in(text: str, special: Iterable[str]) -> list[str]:
    """Find the special tokens in a text, in their order; of two that overlap, the longer one."""
    names = sorted(filter(None, special), key=len, reverse=True)
    return re.findall("|".join(map(re.escape, names)), text) if names else []


def _settings(folder: Path) -> Iterator[tuple[str, float]]:
    given = _read(folder / "generation_config.json")
    for key, name in _PARAMETERS.items():
        value = given.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
            yield name, value


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def _reference(gguf: Path, out: Path) -> str:
    """Write the file's path for a Modelfile: relative if beside or below it, else absolute."""
    file, beside = gguf.resolve(), out.resolve().parent
    if not str(file).isprintable():
        raise RefusedError(f"{file}: its name holds signs that a Modelfile cannot. Choose another name.")
    return f"./{file.relative_to(beside).as_posix()}" if file.is_relative_to(beside) else os.fspath(file)
