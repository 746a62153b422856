"""How far each expert's FFNs are from the base's, by a few rows: a fine-tune of it, a stranger, or the base itself."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.derived import Derived
from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.jobs import CONNECTIONS
from moemerge.checkpoint.stored import float32_of
from moemerge.config import MergeConfig
from moemerge.dtypes import NAMED
from moemerge.formats.dense import DenseModel, Role
from moemerge.sources import ModelFolder

Loaded = tuple[DenseModel, Mapping[str, StoredTensor]]
"""A model's config and its tensors."""
STRANGER: Final = 0.3
"""Fine-tunes of one model differ from it by a few percent; models trained apart, by about 1.4."""
_FAR: Final = 10
_LAYERS: Final = 4
_ROWS: Final = 4
_ROLES: Final[tuple[Role, ...]] = ("gate", "up", "down")


@dataclass(frozen=True)
class Distance:
    """What was found of one expert."""

    by_layer: Mapping[int, float]
    """Of each layer that was looked at, `|expert - base| / |base|` over the rows; empty where none can be compared."""
    rows: int
    """How many were compared."""

    @property
    def mean(self) -> float:
        """Over layers."""
        return sum(self.by_layer.values()) / len(self.by_layer)

    @property
    def is_stranger(self) -> bool:
        """Whether it is no fine-tune of the base, as far as the rows tell."""
        return bool(self.by_layer) and self.mean > STRANGER

    @property
    def is_base(self) -> bool:
        """Whether every row is the base's."""
        return bool(self.by_layer) and not any(self.by_layer.values())


def measure_distances(base: Loaded, experts: Mapping[str, Loaded]) -> tuple[dict[str, Distance], int]:
    """Compare each expert's FFNs with the base's, by some rows of some layers: a few megabytes of each model.

    What adapters add is left out: an adapter's own base is what is compared. Models of another width or with other
    numbers than floats are not compared.

    Args:
        base: the base model.
        experts: by reference.

    Returns:
        The distances by reference, and how many bytes were read from other machines.

    Raises:
        CheckpointError: a file cannot be read.
        SourceError: a file on the Hub cannot be reached.
    """
    chosen = _chosen_layers(base[0].layers)
    fitting = {name: expert for name, expert in experts.items() if expert[0].sizes["ffn"] == base[0].sizes["ffn"]}
    blocks = [block for model in (base, *fitting.values()) for block in _blocks(model, chosen)] if fitting else []
    with ThreadPoolExecutor(CONNECTIONS) as pool:  # on the Hub each block of rows is a request
        rows = list(pool.map(_read, blocks))
    count = len(chosen) * len(_ROLES)
    parts = [rows[start : start + count] for start in range(0, len(rows), count)]
    found = {name: _distance(chosen, parts[0], part) for name, part in zip(fitting, parts[1:], strict=True)}
    remote = sum(block.nbytes for block in blocks if not isinstance(block.path, Path))
    return {name: found.get(name, Distance({}, 0)) for name in experts}, remote


def distance_warnings(
    base: ModelFolder, experts: Sequence[tuple[str, ModelFolder]], distances: Mapping[str, Distance]
) -> list[str]:  # fmt: skip
    """What to say of experts, given with their names, that are no fine-tunes of the base, or nothing but the base."""
    warnings = []
    for name, folder in experts:
        found = distances[folder.reference]
        where = f"in {found.rows} rows of {len(found.by_layer)} layers"
        if found.is_stranger:
            amount = f"{found.mean:.0%}" if found.mean < _FAR else "far more than their own size"
            warnings.append(
                f"{name}: its FFNs differ from the base's by {amount} {where}, where fine-tunes of one model "
                f"differ by a few percent: it is hardly a fine-tune of {base.reference}, whose attention its FFNs were "
                "not trained with. Name the model that it was trained from as base_model, or leave it out"
            )
        elif found.is_base and not folder.adapters and folder.folder != base.folder:
            warnings.append(
                f"{name}: its FFNs are the base's, unchanged (a difference of 0 % {where}), so that it is no expert of "
                "anything. Was it trained as an adapter? That is written model+adapter"
            )
    return warnings


def check_deltas(
    config: MergeConfig, base: ModelFolder, folders: Sequence[ModelFolder], distances: Mapping[str, Distance]
) -> list[str]:  # fmt: skip
    """Why ways that read what fine-tuning changed in the experts' weights cannot read it, as far as rows tell."""
    if not config.way.startswith("delta"):
        return []
    problems = []
    for number, folder in enumerate(folders):
        by_layer = distances[folder.reference].by_layer
        far = {layer: distance for layer, distance in by_layer.items() if distance > STRANGER}
        if far:
            layer, distance = next(iter(far.items()))
            problems.append(differs_too_much(number, layer, distance))
        elif folder.folder == base.folder and not folder.adapters:
            problems.append(is_the_base(number, config.way))
    return problems


def differs_too_much(expert: int, layer: int, distance: float) -> str:
    """What to tell of an expert whose change says nothing."""
    amount = f"{distance:.0%}" if distance < _FAR else "far more than its own size"
    return (
        f"experts[{expert}]: its FFN differs from the base model's by {amount} in layer {layer}, so the base is "
        "not the model that it was trained from, and the difference says nothing. Name that model as base_model, or "
        "give the experts prompts and choose gate_mode ridge"
    )


def is_the_base(expert: int, way: str) -> str:
    """What to tell of an expert that has no change."""
    return (
        f"experts[{expert}]: its FFNs are the base model's own, so its weights do not say what it is for, and "
        f"gate_mode {way} reads nothing else. Give the experts prompts and choose gate_mode ridge"
    )


def _chosen_layers(count: int) -> list[int]:
    return sorted({round(place * (count - 1) / (_LAYERS - 1)) for place in range(_LAYERS)})


def _blocks(model: Loaded, layers: Sequence[int]) -> Iterator[StoredTensor]:
    """Some rows that follow each other, of each projection in each layer."""
    config, tensors = model
    for layer in layers:
        for role in _ROLES:
            tensor = _underlying(config.projection(tensors, layer, role))
            count = min(_ROWS, tensor.shape[0])
            yield tensor.rows((tensor.shape[0] - count) // 3, count)


def _underlying(tensor: StoredTensor) -> StoredTensor:
    """The rows of the model before an adapter, of what is computed of both."""
    while isinstance(tensor.path, Derived):
        given, rows = tensor.path.inputs[0], tensor.shape[0]
        first = tensor.start * given.shape[0] // max(tensor.path.nbytes, 1)
        tensor = given.rows(first, rows)
    return tensor


def _read(tensor: StoredTensor) -> NDArray[np.float32] | None:
    if tensor.dtype not in NAMED:
        return None
    with tensor.open() as reader:
        data = read_exactly(reader, tensor.nbytes)
    return float32_of(data, NAMED[tensor.dtype])


def _distance(
    layers: Sequence[int], ours: Sequence[NDArray[np.float32] | None], theirs: Sequence[NDArray[np.float32] | None]
) -> Distance:
    found, rows = {}, 0
    for place, layer in enumerate(layers):
        span = slice(place * len(_ROLES), (place + 1) * len(_ROLES))
        pairs = [
            (mine, other)
            for mine, other in zip(ours[span], theirs[span], strict=True)
            if mine is not None and other is not None and mine.shape == other.shape
        ]
        whole = sum(float(np.square(mine, dtype=np.float64).sum()) for mine, _ in pairs)
        if not whole or not np.isfinite(whole):
            continue
        changed = sum(float(np.square(other - mine, dtype=np.float64).sum()) for mine, other in pairs)
        if np.isfinite(changed):
            found[layer], rows = (changed / whole) ** 0.5, rows + _ROWS * len(pairs)
    return Distance(found, rows)
