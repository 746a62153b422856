"""Explain command lines that cannot be meant: arguments swapped, models in place of a config, unknown commands."""

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from moemerge.cli.help_pages import MERGE
from moemerge.cli.usage_errors import NoArgsIsHelpError
from moemerge.config.mistaken import HOW_TO_BEGIN, configs_in, elsewhere
from moemerge.errors import RefusedError
from moemerge.file_kinds import FOLDERS, YAML_SUFFIXES, Kind, what_is

_MODEL_NAME: Final = r"[\w.-]+/[\w.-]+(@[\w.-]+)?"
# Written by those who know another program; the right words are options.
_OPTIONS: Final = ("--help", "--version")
_ANCESTOR: Final = "mergekit-moe"
_NO_COMMAND: Final = "there is no such config and no such command"


def unknown_command(arguments: Sequence[str], names: Sequence[str]) -> str | None:
    """Find the command whose name is close to the first word; None if there is none, or the word is a file."""
    if not arguments or arguments[0].startswith("-") or arguments[0] in names:
        return None
    word = arguments[0]
    if what_is(Path(word)) is not Kind.ABSENT:
        return None
    near = (
        next(iter(get_close_matches(word, [*names, *_OPTIONS], n=1)), None) if re.fullmatch(r"[\w-]+", word) else None
    )
    if near:
        return f"{word}: {_NO_COMMAND}. Did you mean {near}?"
    if word == _ANCESTOR and len(arguments) > 1:
        return f"{word}: moemerge stands in its place. Leave the word out: `moemerge {shlex.join(arguments[1:])}`."
    if len(arguments) == 1 and re.fullmatch(r"[\w-]+", word):
        return f"{word}: {_NO_COMMAND}. `moemerge --help` lists the commands."
    return None


def relative_address(arguments: Sequence[str]) -> str | None:
    """Say of an argument `file://PATH` that its path is not absolute, which a `Path` of it no longer shows.

    A config is read from no address at all, which its own message says; a prompt may have spaces.
    """
    matches = (re.fullmatch(r"(?:--[\w-]+=)?(file://[^/\s]\S*)", word) for word in arguments)
    found = next((match[1] for match in matches if match and not match[1].endswith(tuple(YAML_SUFFIXES))), None)
    if found is None:
        return None
    from moemerge.sources.reference import wrong_address

    return wrong_address(found)


def explain_usage(error: Any) -> str:
    """Explain arguments and options that do not fit a command; empty if the error is the command's help page."""
    if isinstance(error, NoArgsIsHelpError):
        return ""
    context = error.ctx
    command = context.command_path if context else "moemerge"
    given = dict(context.params) if context else {}
    message = error.format_message().rstrip(".")
    extra = re.search(r"unexpected extra argument(?:s|\(s\))? \((.*)\)$", message)
    if command == f"moemerge {MERGE}" and (config := given.get("config")) is not None:
        if extra or "'OUT'" in message:
            others = [*([given["out"]] if given.get("out") else []), *(extra[1].split() if extra else [])]
            if problem := _mistaken_config(config, [*map(str, others)]):
                return problem
        if "'OUT'" in message:
            return (
                f"OUT, the folder to write, is missing. Write `moemerge {config} out`, or `moemerge plan {config}` to "
                "see what would be written."
            )
    if "'--data'" in message and (text := _text_without_option(given)):
        return f"{text}: a text to judge by is an option. Write `--data {text}`."
    if extra:
        message = f"{extra[1]}: more arguments than `{command}` takes"
    return f"{message}{'' if message.endswith('?') else '.'} See `{command} --help`."


def _text_without_option(given: Mapping[str, Any]) -> str | None:
    """Find a `NAME=PATH` among the folders of `moemerge eval`."""
    folders = given.get("out")
    words = [*map(str, folders)] if isinstance(folders, tuple | list) else []
    return next((word for word in words if re.fullmatch(r"[^=/]+=.+", word)), None)


def check_order(folder: Path, other: str, usage: str) -> None:
    """Refuse a folder that is none, where the argument after it is the model's folder.

    Args:
        folder: what was given as the model's folder.
        other: what was given after it.
        usage: how the command is written.

    Raises:
        RefusedError: says what to write.
    """
    if what_is(Path(other)) is Kind.MODEL and not folder.is_dir():
        raise RefusedError(f"{folder}: is not the model's folder, {other} is. Write `{usage}`.")


def check_arguments(config: Path, *others: Path, usage: str = "moemerge {config} {out}") -> None:
    """Refuse a command line whose config is none, where the other arguments show what was meant.

    Args:
        config: what was given as the config.
        others: what was given beside it.
        usage: how the command is written.

    Raises:
        RefusedError: says what was given, and what to write.
    """
    if problem := _mistaken_config(config, [*map(str, others)], usage):
        raise RefusedError(problem)


def _mistaken_config(config: Path, others: list[str], usage: str = "moemerge {config} {out}") -> str | None:
    kind = what_is(config)
    if str(config) == "-" or kind in {Kind.CONFIG, Kind.TEXT, Kind.MODEL_FILE, Kind.EMPTY, Kind.UNREADABLE}:
        return None
    for other in others[:1]:
        if what_is(Path(other)) is Kind.CONFIG:
            return f"{config}: is not the config, {other} is. Write `{usage.format(config=other, out=config)}`."
    if kind is Kind.MODEL and not configs_in(config):
        return _models(str(config), others, kind.value)
    if kind is not Kind.ABSENT:
        return None  # its own message says what it is
    is_name = re.fullmatch(_MODEL_NAME, str(config)) and config.suffix.lower() not in YAML_SUFFIXES
    if is_name and what_is(config.parent) not in FOLDERS:
        return _models(str(config), others, "is a model's name")
    return _absent(config)


def _models(first: str, others: Sequence[str], what: str) -> str:
    """Say how to get a config for models whose names were given in place of one."""
    experts = " ".join(others) if others and all(map(_may_be_model, others)) else "EXPERT..."
    return (
        f"{first}: {what}, where a merge config is expected: a YAML file, which `moemerge init {first} {experts}` "
        "writes."
    )


def _may_be_model(name: str) -> bool:
    kind = what_is(Path(name))
    return kind is Kind.MODEL or (kind is Kind.ABSENT and re.fullmatch(_MODEL_NAME, name) is not None)


def _absent(config: Path) -> str:
    """Say that there is no such file, with the nearest config in its folder."""
    if address := elsewhere(config):
        return address
    if what_is(config.parent) not in FOLDERS:
        return f"{config}: there is no such file, and no folder {config.parent}."
    configs = [path.name for path in configs_in(config.parent)]
    if near := get_close_matches(config.name, configs, n=1):
        return f"{config}: there is no such file. Did you mean {config.with_name(near[0])}?"
    if re.fullmatch(r"[\w-]+", str(config)):
        return f"{config}: {_NO_COMMAND}. `moemerge --help` lists the commands."
    if len(configs) == 1:
        return f"{config}: there is no such file. Did you mean {config.with_name(configs[0])}?"
    return f"{config}: there is no such file. {HOW_TO_BEGIN}."
