"""Say why a folder is no model, and which models have a name that is close to one that leads nowhere."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.index import read_json
from moemerge.errors import CheckpointError

_CONFIG: Final = "config.json"
_ADAPTER: Final = "adapter_config.json"
_MOST_ENTRIES: Final = 2000
# Repositories of one owner are alike by that alone.
_VERY_CLOSE: Final = 0.9
_CACHED: Final = "models--"


def no_model(reference: str, folder: Path) -> str:
    """Say why a folder without a `config.json` is no model, and what to write in its place."""
    if (folder / _ADAPTER).is_file():
        base = _base_of(folder / _ADAPTER)
        return f"{reference}: is a LoRA adapter, not a model. Write it after its base model: {base}+{reference}."
    names = sorted(path.name for path in islice(folder.iterdir(), _MOST_ENTRIES))
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs or "gguf" in reference.lower():
        return f"{reference}: is a model in GGUF, which is not read here. Name the model that it was made from."
    inner = [name for name in names if _is_model(folder / name)]
    hint = f" Did you mean {reference.rstrip('/')}/{inner[-1]}?" if inner else ""
    return f"{reference}: has no config.json, so it is not a model that moemerge can read.{hint}"


def _base_of(adapter: Path) -> str:
    """The base model that an adapter names; `model` where it names none."""
    try:
        named: Any = read_json(adapter).get("base_model_name_or_path")
    except CheckpointError:
        named = None
    return named if isinstance(named, str) and named else "model"


def nearest_model(reference: str, folders: Sequence[Path]) -> str | None:
    """Find the model whose name is closest to a reference that leads nowhere; the Hub is not asked.

    Args:
        reference: the name, as a config has it.
        folders: folders that relative names begin at.

    Returns:
        The name to write, of a folder or of a repository in the Hub's cache; None where none is close.
    """
    wanted = Path(reference.partition("@")[0])
    if _is_model(wanted.parent) and wanted.is_file():
        return str(wanted.parent)
    names: dict[str, str] = {}
    for start in folders:
        for inner in dict.fromkeys([wanted.parent, Path()]):
            for folder in _models_in(start / inner):
                names.setdefault(folder.name, str(inner / folder.name))
    for repository in _cached():
        names.setdefault(repository, repository)
        names.setdefault(repository.rpartition("/")[2], repository)
    near = get_close_matches(wanted.name, names, n=1) or get_close_matches(str(wanted), names, n=1, cutoff=_VERY_CLOSE)
    return names[near[0]] if near and names[near[0]] != str(wanted) else None


def _models_in(folder: Path) -> Iterator[Path]:
    try:
        entries = [*islice(folder.iterdir(), _MOST_ENTRIES)]
    except OSError:
        return
    yield from (entry for entry in sorted(entries) if _is_model(entry))


def _is_model(folder: Path) -> bool:
    try:
        return (folder / _CONFIG).is_file()
    except OSError:
        return False


def _cached() -> list[str]:
    from moemerge.sources.hub import cache_folder

    try:
        entries = [path.name for path in islice(cache_folder().iterdir(), _MOST_ENTRIES)]
    except OSError:
        return []
    return sorted(name.removeprefix(_CACHED).replace("--", "/") for name in entries if name.startswith(_CACHED))
