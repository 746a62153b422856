"""The files that `moemerge init` writes: the config, and the schema that editors check it by."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from moemerge.cli.console import announcer
from moemerge.cli.streams import say
from moemerge.errors import OutputError, RefusedError
from moemerge.file_kinds import FOLDERS, Kind, what_is

if TYPE_CHECKING:
    from moemerge.drafting.draft import Draft

STDOUT: Final = "-"
"""In place of a file's name: the config is printed."""


def check_target(output: str, *, overwrite: bool) -> None:
    """Refuse files that could not be written, before anything is opened.

    Raises:
        RefusedError: the config's name is taken or leads into no folder, or the schema's is that of no file.
    """
    from moemerge.drafting.config_text import SCHEMA_FILE

    check_file(output, overwrite=overwrite)
    if output == STDOUT:
        return
    schema = Path(output).with_name(SCHEMA_FILE)
    if (found := what_is(schema)) in {*FOLDERS, Kind.OTHER, Kind.UNREADABLE}:
        raise RefusedError(
            f"{schema}: {found.value}, where the schema is written that editors check the config by. Rename it, or "
            "name a file in another folder with -o."
        )


def check_file(output: str, *, overwrite: bool) -> None:
    """Refuse a config's file that could not be written.

    Raises:
        RefusedError: its name is taken or leads into no folder.
    """
    target, kind = Path(output), what_is(Path(output))
    if output == STDOUT:
        return
    if kind in FOLDERS:
        raise RefusedError(f"{output}: is a folder. Name the file to write, such as {target / 'merge.yaml'}.")
    if kind is not Kind.ABSENT and not overwrite:
        raise RefusedError(f"{output}: is there already. Name another file with -o, or pass --overwrite.")
    if what_is(target.parent) not in FOLDERS:
        raise RefusedError(
            f"{output}: there is no folder {target.parent}. Make it first, or name another file with -o."
        )


def checked_text(draft: "Draft", output: str) -> str:
    """Write a draft as YAML for the file `output`, whose folder relative paths count from, and plan it.

    Raises:
        MoemergeError: what is written could not be merged; see `plan_merge`.
    """
    from moemerge.config.loading import parse_config
    from moemerge.drafting.config_text import config_text
    from moemerge.planning.options import PlanOptions
    from moemerge.planning.planner import plan_merge

    folder = Path(output).parent
    if folder.resolve() != Path.cwd():
        draft = _moved(draft, folder)
    text = config_text(draft, "FILE" if output == STDOUT else shlex.quote(Path(output).name))
    plan_merge(parse_config(text, folder=folder), PlanOptions(weights="stream"))
    return text


def _moved(draft: "Draft", folder: Path) -> "Draft":
    """Make relative folders count from the folder that the config will lie in."""
    from moemerge.config.local_paths import paths_from

    document = {"base_model": draft.base, "experts": [{"source_model": expert.reference} for expert in draft.experts]}
    moved = paths_from(document, folder)
    experts = (
        replace(expert, reference=keys["source_model"])
        for expert, keys in zip(draft.experts, moved["experts"], strict=True)
    )
    return replace(draft, base=moved["base_model"], experts=tuple(experts))


def write_draft(console: Console, output: str, text: str, *, quiet: bool) -> None:
    """Write the schema and the config, and say how to go on.

    Raises:
        OutputError: a file cannot be written.
    """
    from moemerge.drafting.config_text import SCHEMA_FILE

    announce = announcer(console, quiet=quiet)
    if output == STDOUT:
        say(text.removesuffix("\n"))
        announce(f"Next, with what is printed in FILE, and `moemerge schema > {SCHEMA_FILE}` beside it for editors:")
    else:
        try:
            beside = _write_schema(Path(output).with_name(SCHEMA_FILE))
            Path(output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{error.filename}: cannot be written: {error.strerror}.") from error
        announce(f"{output}: written{beside}. Next:")
    shown = "FILE" if output == STDOUT else shlex.quote(output)
    announce(f"  moemerge plan {shown}")
    announce(f"  moemerge {shown} merged/")


def _write_schema(path: Path) -> str:
    """Write the JSON Schema of configs, unless there is a file of this name; returns what to say of it."""
    from moemerge.config.json_schema import published_schema

    schema = published_schema()
    if not path.exists():
        path.write_text(schema, encoding="utf-8")
        return f", and beside it {path.name}, by which editors check it"
    return "" if path.read_bytes() == schema.encode() else f"; the {path.name} beside it is another version's, and kept"
