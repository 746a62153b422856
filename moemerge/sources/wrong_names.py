"""Say why a folder is no model, and which models have a name that is close to one that leads nowhere."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.in_place import is_being_undone, is_unfinished
from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError, NoSuchModelError, SourceError
from moemerge.file_kinds import FOLDERS, PULL, Kind, what_is

_ADAPTER: Final = "adapter_config.json"
_GGUF: Final = ".gguf"
_MOST_ENTRIES: Final = 2000
# Repositories of one owner are alike by that alone.
_VERY_CLOSE: Final = 0.9
_CACHED: Final = "models--"


def check_merged_folder(out: Path | str) -> None:
    """Refuse what is no folder, where a merged model's is expected.

    Raises:
        NoSuchModelError: there is none, or a file; says which folder may be meant.
    """
    path = Path(out)
    kind = what_is(path)
    if kind is Kind.ABSENT:
        near = nearest_model(str(out), [Path()], cached=False)
        hint = f"Did you mean {near}?" if near else "Name the folder that holds the merged model."
        raise NoSuchModelError(f"{out}: there is no such folder. {hint}")
    if kind not in FOLDERS:
        raise NoSuchModelError(no_folder(str(out), path, merged=True))


def no_folder(reference: str, path: Path, *, merged: bool) -> str:
    """Say what a file is that was given in place of a model's folder, and what to name instead.

    Args:
        reference: the file's name as it was given.
        path: the file.
        merged: whether the folder of a merged model is expected, and not that of any model.
    """
    kind, beside_model = what_is(path), what_is(path.parent) is Kind.MODEL
    if kind is Kind.GGUF:
        following = ", which llama.cpp runs. Name the folder that it was written from."
    elif kind is Kind.POINTER:
        following = f". {PULL}"
    elif path.suffix.lower() == _GGUF and kind is not Kind.EMPTY:
        return f"{reference}: {_no_gguf(path)}"
    elif beside_model:
        following = f". Name its folder, {Path(reference).parent}."
    elif kind is Kind.CONFIG and merged:
        following = f", not a model. Merge it with `moemerge {reference} OUT`, then name OUT."
    else:
        expected = "merged model" if merged else "model's config.json"
        following = f". Name the folder that holds the {expected}."
    return f"{reference}: {kind.value}{following}"


def _no_gguf(path: Path) -> str:
    """Say of a file that is called one in GGUF what it begins with."""
    with path.open("rb") as file:
        return f"is no GGUF file: it begins with {file.read(4)!r}, not with b'GGUF'. Download it again."


def no_model(reference: str, folder: Path) -> SourceError:
    """The error that says why a folder without a `config.json` is no model, and what to write in its place."""
    if is_being_undone(folder):
        return SourceError(
            f"{reference}: going back before an edit of it in place was interrupted while files were moved. `moemerge "
            f"edit {reference} --undo` ends that."
        )
    if is_unfinished(folder):
        return SourceError(
            f"{reference}: an edit of it in place was interrupted while files were moved. `moemerge edit {reference} "
            "--undo` brings back what it was before; --commit in place of that ends the edit."
        )
    return NoSuchModelError(f"{reference}: {_what_it_is(reference, folder)}")


def _what_it_is(reference: str, folder: Path) -> str:
    if what_is(folder) is Kind.ADAPTER:
        base = _base_of(folder / _ADAPTER)
        return f"is a LoRA adapter, not a model. Write it after its base model: {base}+{reference}."
    names = sorted(path.name for path in islice(folder.iterdir(), _MOST_ENTRIES))
    inner = [name for name in names if what_is(folder / name) is Kind.MODEL]
    hint = f" Did you mean {reference.rstrip('/')}/{inner[-1]}?" if inner else ""
    return f"has no config.json, so it is not a model that moemerge can read.{hint}"


def _base_of(adapter: Path) -> str:
    """The base model that an adapter names; `model` where it names none."""
    try:
        named: Any = read_json(adapter).get("base_model_name_or_path")
    except CheckpointError:
        named = None
    return named if isinstance(named, str) and named else "model"


def nearest_model(reference: str, folders: Sequence[Path], *, cached: bool = True) -> str | None:
    """Find the model whose name is closest to a reference that leads nowhere; the Hub is not asked.

    Args:
        reference: the name, as a config has it.
        folders: folders that relative names begin at.
        cached: whether the name may be that of a repository in the Hub's cache.

    Returns:
        The name to write, of a folder or a repository; None where none is close.
    """
    wanted = Path(reference.partition("@")[0])
    names: dict[str, str] = {}
    for start in folders:
        for inner in dict.fromkeys([wanted.parent, Path()]):
            for folder in _models_in(start / inner):
                names.setdefault(folder.name, str(inner / folder.name))
    for repository in _cached() if cached else ():
        names.setdefault(repository, repository)
        names.setdefault(repository.rpartition("/")[2], repository)
    near = get_close_matches(wanted.name, names, n=1) or get_close_matches(str(wanted), names, n=1, cutoff=_VERY_CLOSE)
    return names[near[0]] if near and names[near[0]] != str(wanted) else None


def _models_in(folder: Path) -> Iterator[Path]:
    try:
        entries = [*islice(folder.iterdir(), _MOST_ENTRIES)]
    except OSError:
        return
    yield from (entry for entry in sorted(entries) if what_is(entry) is Kind.MODEL)


def _cached() -> list[str]:
    from moemerge.sources.hub import cache_folder

    try:
        entries = [path.name for path in islice(cache_folder().iterdir(), _MOST_ENTRIES)]
    except OSError:
        return []
    return sorted(name.removeprefix(_CACHED).replace("--", "/") for name in entries if name.startswith(_CACHED))
