"""A weight matrix with a LoRA adapter added, computed row by row while it is read."""

from dataclasses import dataclass, field

import numpy as np

from moemerge.checkpoint.derived import Rows, derivation, read_values
from moemerge.checkpoint.header import TensorInfo
from moemerge.dtypes import CONFIG_DTYPES


@dataclass(frozen=True, eq=False)
class LoraSum:
    """The recipe (`moemerge.checkpoint.derived.Recipe`) of a weight with an adapter: `W + scale B A`."""

    a: TensorInfo
    b: TensorInfo
    lengths: TensorInfo | None
    """DoRA's lengths of the rows."""
    scale: float
    _held: dict[str, Rows] = field(default_factory=dict)
    """The factors `A` and `B`, kept from a tensor's first block to its last."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors that the recipe reads beside the weight."""
        return (self.a, self.b, *([self.lengths] if self.lengths else []))

    def __call__(self, row: int, blocks: list[Rows]) -> Rows:
        """Compute the rows from `row` on, in place of the weight's."""
        import torch  # whose product PEFT takes, to the last bit

        # A copy, since another reader of the same tensor may be at its end.
        factors = dict(self._held) or {tensor.name: read_values(tensor) for tensor in self.tensors}
        values = torch.from_numpy(blocks[0])
        rows = torch.from_numpy(factors[self.b.name])[row : row + len(values)]
        values += (rows @ torch.from_numpy(factors[self.a.name])) * self.scale
        if self.lengths:
            wanted = torch.from_numpy(factors[self.lengths.name]).reshape(-1)[row : row + len(values)]
            values *= (wanted / torch.linalg.norm(values, dim=1)).unsqueeze(1)
        if row + len(values) < self.b.shape[0]:
            self._held.update(factors)
        else:
            self._held.clear()
        return blocks[0]

    def rows(self, first: int, weight: Rows) -> Rows:
        """Compute some rows of the changed weight approximately, all at once and without torch.

        Raises:
            CheckpointError: the adapter's file ends too early.
        """
        rows = slice(first, first + len(weight))
        with np.errstate(all="ignore"):  # what is not finite shows
            values = weight + np.float32(self.scale) * (read_values(self.b)[rows] @ read_values(self.a))
            if self.lengths:
                wanted = read_values(self.lengths).reshape(-1)[rows]
                values *= (wanted / np.linalg.norm(values, axis=1))[:, None]
        return values


def read_adapted(tensor: TensorInfo) -> Rows | None:
    """Read some rows (row, width) of a matrix with the changes of its adapters, not rounded to a stored dtype.

    Returns:
        The rows; None where the matrix is computed in another way, or stored in no dtype that can be merged.

    Raises:
        CheckpointError: a file ends too early.
    """
    if made := derivation(tensor):
        before = read_adapted(made.input_rows(tensor))
        if before is None or not isinstance(made.recipe, LoraSum):
            return None
        return made.recipe.rows(made.first_row(tensor), before)
    return read_values(tensor) if tensor.dtype in CONFIG_DTYPES else None
