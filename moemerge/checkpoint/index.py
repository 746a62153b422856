"""Which file of a model folder holds which tensor: the index, one file, or many files without an index."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import StoredTensor
from moemerge.errors import CheckpointError

SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
PICKLE_INDEX: Final = "pytorch_model.bin.index.json"
SINGLE_SAFETENSORS: Final = "model.safetensors"
SINGLE_PICKLE: Final = "pytorch_model.bin"
# Beside the shards in some repositories, holding the same weights again or something else.
_NOT_THE_MODEL: Final = re.compile(r"(consolidated|adapter|training_args|optimizer)[^/]*")
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {value!r:.60}.")
    return value


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name from an index, each file name checked to stay in the index's folder.

    Raises:
        CheckpointError: no usable `weight_map`, or an entry that leaves the folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object 'weight_map' from tensor to file name.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not file_name or re.search(r"[/\\\0:]|^\.\.?$", file_name):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to be in {file_name!r}: a weight_map may name only files beside it."
            )
    return weight_map


def model_files(names: set[str]) -> tuple[str, ...]:
    """Of the file names in a folder without an index, those that hold the model: safetensors before pickles.

    Raises:
        CheckpointError: a shard of a `-of-N` set is not there.
    """
    for single, suffix in ((SINGLE_SAFETENSORS, ".safetensors"), (SINGLE_PICKLE, ".bin")):
        if single in names:
            return (single,)
        stem = "pytorch_model" if suffix == ".bin" else ""
        files = sorted(
            name for name in names if name.endswith(suffix) and name.startswith(stem) and not _NOT_THE_MODEL.match(name)
        )
        if files:
            _check_complete(files)
            return tuple(files)
    return ()


def read_tensors(
    folder: Path, names: set[str], resolve: Callable[[str], Path],
    read_headers: Callable[[Sequence[str]], Iterable[dict[str, StoredTensor]]],
) -> dict[str, StoredTensor]:  # fmt: skip
    """Every tensor of the model in a folder, from headers alone.

    Args:
        folder: the model's folder.
        names: of its files, which may lie elsewhere, but for the index.
        resolve: from the index's name to the file to open; raises for a link that leads elsewhere.
        read_headers: from names of files to the table of tensors of each.

    Raises:
        CheckpointError: no weights, a missing file, an index and headers that disagree, a damaged file.
    """
    index = next((name for name in (SAFETENSORS_INDEX, PICKLE_INDEX) if name in names), None)
    if index == PICKLE_INDEX and SINGLE_SAFETENSORS in names:
        index = None  # converted later, the pickle's index left behind
    weight_map = read_weight_map(resolve(index)) if index else None
    files = sorted(set(weight_map.values())) if weight_map else model_files(names)
    if not files:
        raise CheckpointError(f"{folder}: no weights found: expected *.safetensors or pytorch_model*.bin.")
    missing = [name for name in files if name not in names]
    if missing:
        raise CheckpointError(
            f"{folder}: {index} names {len(missing)} file(s) that are not there: {', '.join(missing[:4])}. "
            "Download the model again."
        )
    tensors: dict[str, StoredTensor] = {}
    for file_name, table in zip(files, read_headers(files), strict=True):
        for name, tensor in table.items():
            if weight_map is None and name in tensors:
                raise CheckpointError(f"{folder}: tensor {name!r} is in {tensors[name].path.name} and in {file_name}.")
            if weight_map is not None and name not in weight_map:
                raise CheckpointError(f"{folder}: tensor {name!r} is in {file_name}, but {index} does not name it.")
            if weight_map is None or weight_map[name] == file_name:
                tensors[name] = tensor
    absent = [name for name in weight_map or () if name not in tensors]
    if weight_map and absent:
        raise CheckpointError(
            f"{folder}: {index} says that tensor {absent[0]!r} is in {weight_map[absent[0]]}, whose header has no such "
            f"tensor ({len(absent)} such tensors in all)."
        )
    return tensors


def build_index(weight_map: Mapping[str, str], total_bytes: int) -> str:
    """The text of `model.safetensors.index.json`."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    return json.dumps(index, indent=2) + "\n"


def _check_complete(files: list[str]) -> None:
    matches = [match for name in files if (match := _SHARD.fullmatch(name))]
    for stem, total, suffix in {(match[1], match[3], match[4]) for match in matches}:
        wanted = [f"{stem}-{number:05d}-of-{total}{suffix}" for number in range(1, int(total) + 1)]
        lost = [name for name in wanted if name not in files]
        if lost:
            raise CheckpointError(
                f"shard {lost[0]} is not there ({len(lost)} of {int(total)}). Download the model again."
            )
