"""Prove before anything is written that the output's tokenizer gives the base's ids; convert it where copies do not."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from moemerge.errors import OutputError, RefusedError
from moemerge.passes.proving import ADDED, RESULT, Entries, Proof, prove
from moemerge.passes.tokenizer_json import unlike
from moemerge.passes.tokens import listed, read_tokenizer_config
from moemerge.planning.tokenizer_files import BaseFiles, notes_for_4, respelled_tokenizer

_CHILD_SECONDS: Final = 600


@dataclass(frozen=True)
class ProvedTokenizer:
    """The tokenizer files that a merge writes beside or instead of copies, with notes."""

    files: Mapping[str, bytes]
    """Contents of the files by name."""
    notes: tuple[str, ...]
    """Notes for users of the output."""
    doubts: tuple[str, ...] = ()
    """Those of the notes which say that the ids could not be proved."""


def prove_tokenizer(files: BaseFiles, output_config: Mapping[str, Any], *, in_process: bool) -> ProvedTokenizer:
    """Compare the tokenizers of base and output as transformers reads them, unless both are known to be read alike.

    Only a temporary folder is written to.

    Args:
        files: the base's files.
        output_config: the output's `config.json`.
        in_process: whether transformers, with its hundreds of megabytes, will be loaded in this process anyway.

    Raises:
        RefusedError: the output would give other ids, even with a new tokenizer.json.
        OutputError: the temporary folder cannot be written.
    """
    made, kept = files.made(output_config["model_type"]), {**files.edited, **files.respelled}
    _check_edited(files)
    if not made:
        return ProvedTokenizer(kept, ())
    try:
        with TemporaryDirectory(prefix="moemerge-") as folder:
            out = Path(folder).resolve() / "out"
            out.mkdir()
            files.write(out, kept)
            (out / "config.json").write_text(json.dumps(output_config), encoding="utf-8")
            base = files.base.folder.resolve()
            in_process = in_process or "transformers" in sys.modules
            proof = prove(base, out, files.added) if in_process else _prove_in_child(base, out, files.added)
            # A child that died may have left partial files.
            names = made if proof.is_proved else ()
            written = {name: content for name in names if (content := _new(out / name, files, name))}
            config = read_tokenizer_config(out)
    except OSError as error:
        where = error.filename2 or error.filename or "a temporary folder"
        raise OutputError(f"{where}: {error.strerror or error}.") from error
    model_type = output_config["model_type"]
    if proof.base_class and not proof.is_proved:
        raise RefusedError(_refusal(proof, model_type))
    doubts = () if proof.base_class else (_doubt(proof),)
    made_anew = {name: content for name, content in written.items() if content != files.edited.get(name)}
    notes = _notes(files, proof, made_anew, config, model_type)
    return ProvedTokenizer({**files.edited, **written}, (*doubts, *notes), doubts)


def _check_edited(files: BaseFiles) -> None:
    """Refuse an edited tokenizer.json that would be read otherwise than the base's and its added tokens.

    Raises:
        RefusedError: says what would be read otherwise.
    """
    if "tokenizer.json" not in files.edited:
        return
    base = files.copied["tokenizer.json"].read_text(encoding="utf-8")
    added = {entry["content"]: entry["id"] for entry in files.added or ()}
    if problem := unlike(base, files.edited["tokenizer.json"].decode(), added):
        raise RefusedError(
            f"tokenizer: {problem}, so that tokens cannot be added to the base's tokenizer.json. `tokenizer: base` "
            "leaves it as it is."
        )


def _prove_in_child(base: Path, out: Path, added: Entries | None = None) -> Proof:
    """Compare them in a child process, which frees its memory at the end; it imports as this one, without network."""
    if added is not None:
        out.with_name(ADDED).write_text(json.dumps(added), encoding="utf-8")
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)  # noqa: PTH100  links stay as they are
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "USE_TORCH": "0"}
    command = [sys.executable, "-m", prove.__module__, str(base), str(out)]
    try:
        done = subprocess.run(  # noqa: S603  this program itself
            command, cwd=out.parent, env=environment, capture_output=True, timeout=_CHILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        how = f"has not been read after {_CHILD_SECONDS} seconds"
    else:
        result = out.with_name(RESULT)
        if done.returncode == 0 and result.is_file():
            return Proof(**json.loads(result.read_text(encoding="utf-8")))
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        how = f"ends the process that reads it ({listed([str(done.returncode), *last])})"
    return Proof(problem=how, step="save it anew")


def _new(path: Path, files: BaseFiles, name: str) -> bytes | None:
    """Read a file, unless it is an unchanged copy of the base's."""
    content, copied_from = path.read_bytes() if path.is_file() else None, files.copied.get(name)
    return None if copied_from and content == copied_from.read_bytes() else content


def _doubt(proof: Proof) -> str:
    return (
        f"the base's tokenizer {proof.problem}; its files are copied, but nothing proves that the output reads "
        f"text as the base does. To have it proved, {proof.step} and merge again"
    )


def _notes(
    files: BaseFiles, proof: Proof, written: Mapping[str, bytes], config: Mapping[str, Any], model_type: str
) -> Iterator[str]:
    reader = f"transformers {version('transformers')}"
    if not proof.base_class:
        yield from notes_for_4(files.tokenizer_config)
    if "tokenizer.json" in written and "tokenizer.json" in files.copied:
        yield (
            f"tokenizer.json is not the base's file but the base's tokenizer as {reader} reads it, by "
            f"{proof.base_class}: the file itself it would read otherwise for {model_type}. Programs that read "
            "the file as it is read the output otherwise than the base"
        )
    elif "tokenizer.json" in written and "tokenizer.model" in files.copied:
        yield (
            f"tokenizer.json is made of tokenizer.model by {reader}; transformers 4 and 5 convert it differently, so "
            "merge with the one that will read the output"
        )
    if "tokenizer_config.json" in written:
        base = respelled_tokenizer(files.tokenizer_config)
        changed = [key for key in dict.fromkeys([*base, *config]) if base.get(key) != config.get(key)]
        if changed:
            yield f"tokenizer_config.json is not the base's in {', '.join(changed)}, so that {reader} reads it alike"


def _refusal(proof: Proof, model_type: str) -> str:
    step = "Choose another architecture, or merge from a copy of the base without tokenizer files."
    if proof.output_class not in {"", proof.base_class}:
        step = (
            f"If {proof.output_class} is right, name it as tokenizer_class in a copy of the base; else {step.lower()}"
        )
    reader = f"transformers {version('transformers')}"
    return (
        f"base_model: {reader} would not read text for a {model_type} as it does for the base, by "
        f"{proof.base_class}: {proof.problem}. {step}"
    )
