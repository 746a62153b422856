"""The map from a model's tensors to its files: from an index, from one file, or from many files without an index."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.json_text import MOST_BYTES, JsonTextError, parse_json
from moemerge.checkpoint.unreadable import is_no_tensor
from moemerge.errors import CheckpointError

SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
PICKLE_INDEX: Final = "pytorch_model.bin.index.json"
SINGLE_SAFETENSORS: Final = "model.safetensors"
SINGLE_PICKLE: Final = "pytorch_model.bin"
# These lie beside the shards in some repositories and hold the same weights again, or something else.
_NOT_THE_MODEL: Final = re.compile(r"(consolidated|adapter|training_args|optimizer)[^/]*")
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


def read_json(path: Path, repeated: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Read a JSON object; see `parse_json`.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: there is no such file.")
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file.")
        with path.open("rb") as file:
            value = parse_json(file.read(MOST_BYTES + 1), repeated)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except JsonTextError as error:
        raise CheckpointError(f"{path}: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {value!r:.60}.")
    return value


def read_weight_map(path: Path) -> dict[str, str]:
    """Read an index's map from tensor to file name; each file name is checked to stay in the index's folder.

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


@dataclass(frozen=True)
class Weights:
    """The files of a folder that hold the model's weights."""

    files: tuple[str, ...]
    index: str = ""
    """Name of the index that lists them; empty where there is none."""
    note: str = ""
    """A note on other files in the folder that could be taken for the weights."""


def choose_weights(names: Collection[str], read_index: Callable[[str], Iterable[str]], named: str = "") -> Weights:
    """Choose the files with the weights among the regular files of a folder, as transformers 4 and 5 choose.

    One whole file goes before an index, safetensors before pickles (`_get_resolved_checkpoint_files`). Where none of
    these is there, transformers finds nothing, and files of other names, or shards without an index, are taken.

    Args:
        names: names of the files in the folder.
        read_index: a function from an index's name to the names of the files in it.
        named: the value of `transformers_weights` in config.json, which transformers 5 takes before all else.

    Raises:
        CheckpointError: a shard is not there.
    """
    if named:
        note = f"config.json names {named} as the file of its weights, and that is read"
        is_index = named.endswith(".index.json")
        return Weights(tuple(sorted(set(read_index(named)))) if is_index else (named,), named if is_index else "", note)
    for single, index in ((SINGLE_SAFETENSORS, SAFETENSORS_INDEX), (SINGLE_PICKLE, PICKLE_INDEX)):
        if single in names:
            beside = f"has an index of shards beside {single}, which is read alone, as transformers does"
            return Weights((single,), note=beside if index in names else "")
        if index in names:
            return Weights(tuple(sorted(set(read_index(index)))), index)
    if loose := _loose_shards(names, ".safetensors") or _loose_shards(names, ".bin"):
        whose = f"{len(loose)} files {loose[0]} ...: all are" if len(loose) > 1 else f"{loose[0]}: it is"
        return Weights(loose, note=f"no index names its {whose} read, but transformers would find no weights")
    return Weights(())


def _loose_shards(names: Collection[str], suffix: str) -> tuple[str, ...]:
    stem = "pytorch_model" if suffix == ".bin" else ""
    files = sorted(
        name for name in names if name.endswith(suffix) and name.startswith(stem) and not _NOT_THE_MODEL.match(name)
    )
    _check_complete(files)
    return tuple(files)


def read_tensors(
    folder: Path,
    weights: Weights,
    names: Collection[str],
    read_map: Callable[[str], Mapping[str, str]],
    read_headers: Callable[[Sequence[str]], Iterable[dict[str, TensorInfo]]],
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Read the table of every tensor of the model in a folder from headers alone, with notes on what is odd.

    Like transformers, this takes all that the files hold, whichever file the index names; of a tensor that
    two files hold, the last is taken.

    Args:
        folder: the model's folder, for messages.
        weights: the files to read.
        names: names of the files that are there.
        read_map: a function from the index's name to its map from tensors to files.
        read_headers: a function from names of files to the tensor table of each.

    Raises:
        CheckpointError: no weights, a missing file, an index and headers that disagree, a damaged file.
    """
    _check_present(folder, weights, names)
    weight_map = read_map(weights.index) if weights.index else None
    tensors: dict[str, TensorInfo] = {}
    others: dict[str, TensorInfo] = {}
    notes = [weights.note] if weights.note else []
    twice: list[str] = []
    for file_name, table in zip(weights.files, read_headers(weights.files), strict=True):
        others |= {name: entry for name, entry in table.items() if is_no_tensor(entry)}  # an index need not name them
        for name, tensor in [entry for entry in table.items() if not is_no_tensor(entry[1])]:
            if name in tensors and weight_map is None:
                raise CheckpointError(f"{folder}: tensor {name!r} is in {tensors[name].path.name} and in {file_name}.")
            twice += [name] * (name in tensors)
            tensors[name] = tensor
    whole = tensors | {name: entry for name, entry in others.items() if name not in tensors}
    if weight_map is not None:
        notes += _compare_with_index(folder, weights.index, weight_map, tensors, twice)
    return whole, notes


def _check_present(folder: Path, weights: Weights, names: Collection[str]) -> None:
    if not weights.files:
        raise CheckpointError(f"{folder}: no weights found: expected *.safetensors or pytorch_model*.bin.")
    missing = [name for name in weights.files if name not in names]
    if missing:
        raise CheckpointError(
            f"{folder}: {weights.index or 'config.json'} names {len(missing)} file(s) that are not there: "
            f"{', '.join(missing[:4])}. Download the model again."
        )


def _compare_with_index(
    folder: Path, index: str, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], twice: Collection[str]
) -> list[str]:
    """Refuse files that lack tensors of the index; note those that are elsewhere than it says, or in two files."""
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder}: {index} says that tensor {absent[0]!r} is in {weight_map[absent[0]]}, whose header has "
            f"no such tensor ({len(absent)} such tensors in all)."
        )
    odd = [name for name, tensor in tensors.items() if weight_map.get(name) != tensor.path.name]
    if not odd:
        return []
    return [
        f"{index} does not say of {len(odd)} tensor(s), such as {odd[0]!r}, that they are in "
        f"{tensors[odd[0]].path.name}; they are read from there{', the last of two' if odd[0] in twice else ''}, "
        "as transformers does"
    ]


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
