"""Measure by a few rows how far each expert's FFNs are from the base's: a fine-tune, a stranger, or the base itself."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.derived import derivation, leaves
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.jobs import CONNECTIONS
from moemerge.checkpoint.numbers import is_rounded
from moemerge.config.schema import MergeConfig
from moemerge.dtypes import CONFIG_DTYPES, DType
from moemerge.families.dense import ROLES, DenseModel, ModelTensors, Role
from moemerge.sources.lora_sum import read_adapted
from moemerge.sources.model_folder import ModelFolder

STRANGER: Final = 0.3
"""Distance of a stranger: fine-tunes of one model differ by a few percent, models trained apart by about 1.4."""
_FAR: Final = 10
_LAYERS: Final = 4
_ROWS: Final = 4


@dataclass(frozen=True)
class Distance:
    """The distance of one expert from the base."""

    by_layer: Mapping[int, float]
    """`|expert - base| / |base|` over the rows of each layer that was looked at; empty where none can be compared."""
    rows: int
    """Number of rows that were compared."""

    @property
    def mean(self) -> float:
        """Mean distance over layers."""
        return sum(self.by_layer.values()) / len(self.by_layer)

    @property
    def is_stranger(self) -> bool:
        """Whether the expert is no fine-tune of the base, as far as the rows tell."""
        return bool(self.by_layer) and self.mean > STRANGER

    @property
    def is_base(self) -> bool:
        """Whether every row is the base's."""
        return bool(self.by_layer) and not any(self.by_layer.values())


@dataclass(frozen=True)
class _Rows:
    numbers: NDArray[np.float32]
    dtype: DType | None
    """Dtype that the rows are stored in; None for computed rows."""

    def squared_distance(self, other: "_Rows") -> float:
        """The squared distance of rows; 0 where one side is the other, rounded to its dtype."""
        if is_rounded(self.numbers, other.numbers, [dtype for dtype in (self.dtype, other.dtype) if dtype]):
            return 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.square(np.subtract(other.numbers, self.numbers, dtype=np.float64)).sum())


Known = dict[TensorInfo | None, _Rows | None]
"""Rows that were read, by the tensor that they are."""


def measure_distances(
    base: ModelTensors,
    experts: Mapping[str, ModelTensors],
    layers: Mapping[str, Sequence[int]],
    known: Known | None = None,
) -> tuple[dict[str, Distance], int]:
    """Compare each expert's FFNs with the base's, by some rows of some layers: a few megabytes of each model.

    Models of another width or with other numbers than floats are not compared.

    Args:
        base: the base model.
        experts: experts by reference, with their adapters added.
        layers: the layers in which each expert takes part, by reference.
        known: rows that an earlier comparison read, which are not read again; this one's are added.

    Returns:
        The distances by reference, and how many bytes were read from other machines.

    Raises:
        CheckpointError: a file cannot be read.
        SourceError: a file on the Hub cannot be reached.
    """
    fitting = {name: expert for name, expert in experts.items() if expert.model.ffn_widths == base.model.ffn_widths}
    chosen = {name: _spread(_changed_by_adapters(expert, layers[name])) for name, expert in fitting.items()}
    theirs = {(name, layer, role): _block(fitting[name], layer, role) for name, layer, role in _places(chosen)}
    ours = {(layer, role): _block(base, layer, role) for _, layer, role in _places(chosen)}
    known = {} if known is None else known
    missing = list(dict.fromkeys(block for block in (*ours.values(), *theirs.values()) if block not in known))
    with ThreadPoolExecutor(CONNECTIONS) as pool:  # on the Hub each block of rows is a request
        known.update(zip(missing, pool.map(_read, missing), strict=True))
    our_rows, their_rows = ({place: known[block] for place, block in blocks.items()} for blocks in (ours, theirs))
    found = {
        name: _distance(
            {layer: [(our_rows[layer, role], their_rows[name, layer, role]) for role in ROLES] for layer in layers}
        )
        for name, layers in chosen.items()
    }
    read = chain.from_iterable(leaves(_underlying(block)) for block in missing if block)
    remote = sum(leaf.nbytes for leaf in read if not isinstance(leaf.path, Path))
    return {name: found.get(name, Distance({}, 0)) for name in experts}, remote


def distance_warnings(
    base: ModelFolder, experts: Sequence[tuple[str, ModelFolder]], distances: Mapping[str, Distance]
) -> list[str]:
    """Warnings of experts, given with their names, that are no fine-tunes of the base, or nothing but the base."""
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
        elif found.is_base and folder.adapters:
            warnings.append(
                f"{name}: its adapter adds nothing to the base's FFNs (a difference of 0 % {where}): if it is so "
                "everywhere, it is no expert of anything. Is the adapter's training finished, and its lora_alpha not 0?"
            )
        elif found.is_base and folder.folder != base.folder:
            warnings.append(
                f"{name}: its FFNs are the base's, unchanged (a difference of 0 % {where}): if they are so "
                "everywhere, it is no expert of anything. Was it trained as an adapter? That is written model+adapter"
            )
    return warnings


def distance_notes(
    base: DenseModel, experts: Sequence[tuple[str, ModelFolder, DenseModel]], distances: Mapping[str, Distance]
) -> list[str]:
    """Notes on experts of which nothing is known, because they cannot be compared with the base."""
    return [
        f"{name}: whether it is a fine-tune of the base model is not known: its FFNs "
        + (
            "have no finite numbers to compare, or the base has none or zeros"
            if model.ffn_widths == base.ffn_widths
            else f"are {max(model.ffn_widths)} wide, the base's {max(base.ffn_widths)}"
        )
        for name, folder, model in experts
        if not distances[folder.reference].by_layer
    ]


def check_deltas(
    config: MergeConfig, base: ModelFolder, folders: Sequence[ModelFolder], distances: Mapping[str, Distance]
) -> list[str]:
    """Reasons why methods that read the changes made by fine-tuning cannot read them from the experts' weights."""
    if not config.method.needs_weights:
        return []
    problems = []
    for number, folder in enumerate(folders):
        by_layer = distances[folder.reference].by_layer
        far = {layer: distance for layer, distance in by_layer.items() if distance > STRANGER}
        if far:
            layer, distance = next(iter(far.items()))
            problems.append(differs_too_much(number, layer, distance))
        elif folder.folder == base.folder and not folder.adapters:
            problems.append(is_the_base(number, config.method.name))
    return problems


def differs_too_much(expert: int, layer: int, distance: float) -> str:
    """The refusal of an expert whose change says nothing."""
    amount = f"{distance:.0%}" if distance < _FAR else "far more than its own size"
    return (
        f"experts[{expert}]: its FFN differs from the base model's by {amount} in layer {layer}, so the base is "
        "not the model that it was trained from, and the difference says nothing. Name that model as base_model, or "
        "give the experts prompts and choose gate_mode ridge"
    )


def is_the_base(expert: int, method: str) -> str:
    """The refusal of an expert that has no change."""
    return (
        f"experts[{expert}]: its FFNs are the base model's own, so its weights do not say what it is for, and "
        f"gate_mode {method} reads nothing else. Give the experts prompts and choose gate_mode ridge"
    )


def _spread(layers: Sequence[int]) -> list[int]:
    return sorted({layers[round(place * (len(layers) - 1) / (_LAYERS - 1))] for place in range(_LAYERS)})


def _changed_by_adapters(model: ModelTensors, layers: Sequence[int]) -> Sequence[int]:
    """The layers in which an expert's adapters add something; all layers if it has none."""
    changed = [layer for layer in layers if any(derivation(model.projection(layer, role)) for role in ROLES)]
    return changed or layers


def _places(chosen: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int, Role]]:
    for name, layers in chosen.items():
        for layer in layers:
            for role in ROLES:
                yield name, layer, role


def _block(model: ModelTensors, layer: int, role: Role) -> TensorInfo | None:
    """Select some consecutive rows of a projection; None for a base that lacks this FFN."""
    try:
        tensor = model.projection(layer, role)
    except KeyError:
        return None
    count = min(_ROWS, tensor.shape[0])
    return tensor.rows((tensor.shape[0] - count) // 3, count)


def _underlying(tensor: TensorInfo) -> TensorInfo:
    """Return the same rows of the model before an adapter, if they are computed from both."""
    while made := derivation(tensor):
        tensor = made.input_rows(tensor)
    return tensor


def _read(tensor: TensorInfo | None) -> _Rows | None:
    if tensor is None:
        return None
    numbers = read_adapted(tensor)
    if numbers is None:
        return None
    return _Rows(numbers, None if derivation(tensor) else CONFIG_DTYPES[tensor.dtype])


def _distance(layers: Mapping[int, Sequence[tuple[_Rows | None, _Rows | None]]]) -> Distance:
    found, rows = {}, 0
    for layer, read in layers.items():
        pairs = [
            (ours, theirs) for ours, theirs in read if ours and theirs and ours.numbers.shape == theirs.numbers.shape
        ]
        whole = sum(float(np.square(ours.numbers, dtype=np.float64).sum()) for ours, _ in pairs)
        if not whole or not np.isfinite(whole):
            continue
        changed = sum(ours.squared_distance(theirs) for ours, theirs in pairs)
        if np.isfinite(changed):
            found[layer], rows = (changed / whole) ** 0.5, rows + _ROWS * len(pairs)
    return Distance(found, rows)
