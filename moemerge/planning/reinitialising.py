"""Drop-upcycling: a share of an expert's neurons drawn anew, so that copies of one model can learn different things.

The same neurons are chosen in all three projections. Their weights are drawn from a normal distribution with the mean
and the standard deviation that these neurons' weights had: https://arxiv.org/abs/2502.19261
"""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.derived import Derived, Rows, blocks_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.own_lock import OwnLock
from moemerge.config.schema import Expert
from moemerge.families.dense import Role


@dataclass(frozen=True)
class Reinitialising:
    """The neurons of one expert that are drawn anew."""

    share: float
    """The share of the expert's neurons."""
    seed: int
    expert: int
    """Number of the expert; others have other neurons."""

    def of(self, tensor: TensorInfo, layer: int, role: Role) -> TensorInfo:
        """Draw a projection's part anew: rows of (neuron, hidden), or columns of `down` (hidden, neuron)."""
        recipe = _Recipe(tensor, self._chosen(tensor.shape[role == "down"], layer), role, self._seed(layer, role))
        key = repr((self, layer, role))
        name = f"{self.share:g} of the neurons drawn anew in"
        return Derived(name, (tensor,), recipe, key, tensor.dtype, rereads=True).tensor(tensor.name)

    def _chosen(self, width: int, layer: int) -> NDArray[np.bool_]:
        """Which of an FFN's neurons are drawn anew (neuron,)."""
        chosen = np.zeros(width, np.bool_)
        chosen[np.random.default_rng(self._seed(layer)).permutation(width)[: int(self.share * width)]] = True
        return chosen

    def _seed(self, *place: int | str) -> int:
        return zlib.crc32(" ".join(map(str, (self.seed, self.expert, *place))).encode())


def reinitialising_of(expert: Expert, number: int) -> Reinitialising | None:
    """What an expert's entry in the config says of neurons that are drawn anew; None if none are."""
    settings = expert.reinit
    return Reinitialising(settings.share, settings.seed, number) if settings else None


class _Recipe:
    """A recipe for a projection with some neurons drawn anew, in blocks that are drawn each by itself."""

    def __init__(self, tensor: TensorInfo, chosen: NDArray[np.bool_], role: Role, seed: int) -> None:
        self._tensor, self._chosen, self._in_columns, self._seed = tensor, chosen, role == "down", seed
        self._lock = OwnLock()
        self._distribution: tuple[float, float] | None = None

    def __call__(self, row: int, blocks: list[Rows]) -> Rows:
        """Draw the chosen neurons of some rows anew."""
        with self._lock:
            self._distribution = self._distribution or self._measure()
        mean, deviation = self._distribution
        values = blocks[0].copy()
        place = self._place(row, len(values))
        generator = np.random.default_rng((self._seed, row))
        drawn = generator.standard_normal(values[place].shape, np.float32)
        values[place] = drawn * np.float32(deviation) + np.float32(mean)
        return values

    def _place(self, row: int, rows: int) -> tuple[slice, NDArray[np.bool_]] | NDArray[np.bool_]:
        """The chosen neurons' weights among some rows."""
        return (slice(None), self._chosen) if self._in_columns else self._chosen[row : row + rows]

    def _measure(self) -> tuple[float, float]:
        """Mean and standard deviation of the chosen neurons' weights."""
        count, total, squares, row = 0, 0.0, 0.0, 0
        for (block,) in blocks_of([self._tensor]):
            weights = block[self._place(row, len(block))].astype(np.float64)
            count, row = count + weights.size, row + len(block)
            total, squares = total + float(weights.sum()), squares + float(np.square(weights).sum())
        mean = total / max(count, 1)
        return mean, max(squares / max(count, 1) - mean**2, 0.0) ** 0.5
