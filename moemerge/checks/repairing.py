"""Restore a merged model that transformers 5 has saved again to the spelling that every reader knows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX, SINGLE_SAFETENSORS, read_json, read_weight_map
from moemerge.checks.files import ABSENT, Difference
from moemerge.errors import OutputError, RefusedError
from moemerge.families.family import MoeFamily
from moemerge.families.layer_names import layer_prefix
from moemerge.families.respelling import lost_keys, respelled_keys
from moemerge.families.selection import MOE_FAMILIES
from moemerge.model_card.metadata import rewritten
from moemerge.planning.tokenizer_files import respelled_tokenizer
from moemerge.sources.model_folder import ModelFolder, open_merged
from moemerge.sources.tensor_tables import read_tensor_table

_CONFIG: Final = "config.json"
_TOKENIZER: Final = "tokenizer_config.json"


def repair(out: Path | str, *, dry_run: bool = False) -> list[Difference]:
    """Put back what `save_pretrained` of transformers 5 drops or spells in its own way; returns what was put back.

    Unknown keys stay, weights are not touched, and each file takes its old one's place when it is
    complete. The merge's other files are not needed: a copy that was saved elsewhere has none of them.

    Args:
        out: the folder of the merged model.
        dry_run: write nothing.

    Raises:
        SourceError: there is no such folder or no model in it.
        CheckpointError: the model's files are damaged.
        RefusedError: the model is no mixture that moemerge writes, keys contradict each other, or tensors were renamed.
        OutputError: a file cannot be written.
    """
    model = open_merged(out)
    family = MOE_FAMILIES.get(str(model.config.get("model_type")))
    if family is None:
        raise RefusedError(
            f"{out}: its model_type is {model.config.get('model_type')!r}, no mixture that moemerge writes. Name the "
            "folder of one; `moemerge families` lists them."
        )
    if model.whole:
        raise RefusedError(f"{out}: is a multimodal model, a {model.stored_type}, whose config.json needs no repair.")
    _check_names(out, family, read_tensor_table(model, lambda _: None))
    tokenizer = model.file(_TOKENIZER)
    changed: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        _CONFIG: (model.config, _repaired(out, family, model.config))
    }
    if tokenizer:
        given = read_json(tokenizer)
        changed[_TOKENIZER] = (given, respelled_tokenizer(given))
    changed = {name: (old, new) for name, (old, new) in changed.items() if old != new}
    differences = [difference for name, tables in changed.items() for difference in _compare(name, *tables)]
    stale = _stale_index(model)
    if stale:
        differences.append(Difference(SAFETENSORS_INDEX, ABSENT, "names shards that are not there"))
    if not dry_run:
        for name, (_, new) in changed.items():
            with rewritten(model.folder / name) as draft:
                draft.write_text(json.dumps(dict(sorted(new.items())), indent=2) + "\n", encoding="utf-8")
        if stale:
            _remove(stale)
    return differences


def _repaired(out: Path | str, family: MoeFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    lost = lost_keys(family, config)
    for key, value in lost.items():
        if key in config and config[key] != value:
            raise RefusedError(
                f"{out}: config.json says {key}: {_shown(config[key])}, and elsewhere in other words "
                f"{_shown(value)}: readers take the one or the other. Remove what is wrong."
            )
    return {**config, **lost, **respelled_keys(family, config)}


def _check_names(out: Path | str, family: MoeFamily, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors that are not named as in the family's checkpoints, which no `config.json` can repair."""
    routers = [name for name in tensors if name.endswith(f".{family.router}")]
    wanted = [layer_prefix(0) + family.router] if not routers else []
    for name in routers:
        layer = name.removesuffix(family.router)
        count = tensors[name].shape[0]
        wanted += [layer + part.format(expert=expert) for part in family.experts for expert in range(count)]
    lost = next((name for name in wanted if name not in tensors), None)
    if lost:
        others = next((name for name in tensors if ".experts." in name), "none of experts")
        raise RefusedError(
            f"{out}: has no tensor {lost}, but {others}: names that transformers 5 gives them in memory, or of another "
            "model. Save it again from where it was trained, with save_original_format=True, which is the default."
        )


def _compare(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(f"{name}: {key}", _entry(new, key), _entry(old, key))
        for key in sorted({*old, *new})
        if _entry(old, key) != _entry(new, key)
    ]


def _entry(table: Mapping[str, Any], key: str) -> str:
    return _shown(table[key]) if key in table else ABSENT


def _shown(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _stale_index(model: ModelFolder) -> Path | None:
    """Find an index that was left beside one whole file: vLLM takes it for the list of files."""
    index = model.file(SAFETENSORS_INDEX)
    if not index or not model.file(SINGLE_SAFETENSORS):
        return None
    named = set(read_weight_map(index).values())
    return None if any((model.folder / name).exists() for name in named) else index


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed ({error.strerror}).") from error
