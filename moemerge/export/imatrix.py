"""Importance matrices: what passes through each column of a model's weights, in the format of llama.cpp's tools."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moemerge.checkpoint.disk import drafted
from moemerge.checkpoint.gguf_contents import GgufContents, read_contents
from moemerge.errors import CheckpointError, OutputError, RefusedError
from moemerge.packages import need

Array = npt.NDArray[np.float32]

_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_FLOAT32: Final = 0
_MOST_TOKENS: Final = 2**53
FEWEST_TOKENS: Final = 32
"""Tokens below which an expert counts as not covered: the mean of so few squares is a quarter off."""


@dataclass(frozen=True)
class ColumnSquares:
    """Squares of what has passed through the columns of one tensor, which may be a stack of matrices."""

    sums: Array
    """Squares (matrix, column), summed over tokens."""
    counts: npt.NDArray[np.int64]
    """Number of tokens (matrix,)."""

    @property
    def uncovered(self) -> list[int]:
        """Matrices of a stack that too few tokens have reached to tell what is important."""
        return [] if len(self.counts) == 1 else (self.counts < FEWEST_TOKENS).nonzero()[0].tolist()

    def means(self) -> Array:
        """Means of squares (matrix, column); a matrix that is not covered gets the mean of the others.

        Where none is covered, all get the mean of all tokens there are, or ones where there are none.
        """
        missing = self.uncovered
        known = [matrix for matrix in range(len(self.counts)) if matrix not in missing] or list(range(len(self.counts)))
        total = self.counts[known].sum()
        pooled = self.sums[known].sum(axis=0) / total if total else np.ones(self.sums.shape[1])
        found = self.sums / np.maximum(self.counts, 1)[:, None]
        found[missing] = pooled
        if not self.counts.any():
            found[:] = pooled
        return found.astype(np.float32)


@dataclass(frozen=True)
class Importance:
    """An importance matrix of a model."""

    tensors: Mapping[str, ColumnSquares]
    """Sums and counts by the tensor's name in a GGUF file."""
    texts: tuple[str, ...] = ()
    """Names of the texts that it was computed from."""
    notes: tuple[str, ...] = ()
    """Notes on the texts that it was computed from."""

    def uncovered(self) -> dict[str, list[int]]:
        """Experts that too few tokens have reached, by the name of their stack."""
        return {name: missing for name, found in self.tensors.items() if (missing := found.uncovered)}

    def check(self, model: GgufContents) -> None:
        """Refuse a matrix of another model.

        Raises:
            RefusedError: a tensor has another size, or the model has none of the tensors.
        """
        known = self.tensors.keys() & model.tensors.keys()
        if not known:
            raise RefusedError(
                f"importance matrix: none of its {len(self.tensors)} tensors is one of {model.path.name}: it was made "
                "of another model. Make one of this model."
            )
        for name in sorted(known):
            columns, _, *stack = (*model.tensors[name].sizes, 1)
            expected, found = (int(np.prod(stack)), columns), self.tensors[name].sums.shape
            if found != expected:
                raise RefusedError(
                    f"importance matrix: {name} is of {found[0]} x {found[1]} columns; expected {expected[0]} x "
                    f"{expected[1]}, as in {model.path.name}. Make one of this model."
                )

    def write(self, path: Path) -> None:
        """Write the matrix as `llama-imatrix` does; what is not covered is written as it was counted.

        Raises:
            RefusedError: gguf is not installed.
            OutputError: the file cannot be written.
        """
        need("gguf", "To write an importance matrix")
        from gguf import GGUFWriter

        try:
            with drafted(path) as draft:
                writer = GGUFWriter(draft, "")
                self._put(writer)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
                writer.close()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error

    def _put(self, writer: Any) -> None:
        writer.add_type("imatrix")
        if self.texts:
            writer.add_array("imatrix.datasets", self.texts)
        writer.add_uint32("imatrix.chunk_count", 1)
        tokens = max((int(found.counts.max()) for found in self.tensors.values()), default=0)
        writer.add_uint32("imatrix.chunk_size", tokens)
        for name in sorted(self.tensors):
            found = self.tensors[name]
            writer.add_tensor(f"{name}{_SUMS}", found.sums.astype(np.float32))
            writer.add_tensor(f"{name}{_COUNTS}", found.counts.astype(np.float32)[:, None])


def read_importance(path: Path) -> Importance:
    """Read an importance matrix from a GGUF file, as this program and `llama-imatrix` write it.

    Raises:
        SourceError: the file cannot be read.
        CheckpointError: the file is damaged or holds something else.
    """
    contents = read_contents(path)
    return Importance(dict(_tensors(path, contents)))


def _tensors(path: Path, contents: GgufContents) -> Iterator[tuple[str, ColumnSquares]]:
    names = [name.removesuffix(_SUMS) for name in contents.tensors if name.endswith(_SUMS)]
    if not names:
        raise CheckpointError(f"{path}: is not an importance matrix: no tensor is called *{_SUMS}. Name another file.")
    for name in names:
        parts = []
        for ending in (_SUMS, _COUNTS):
            stored = contents.tensors.get(f"{name}{ending}")
            if stored is None or stored.type != _FLOAT32:
                raise CheckpointError(f"{path}: {name}{ending} is missing or not in float32. Make the matrix again.")
            count = int(np.prod(stored.sizes, dtype=object))
            if stored.offset + 4 * count > contents.nbytes:
                raise CheckpointError(f"{path}: {stored.name} goes beyond the file's end. Make the matrix again.")
            parts.append(np.fromfile(path, "<f4", count, offset=stored.offset))
        sums, counts = parts
        possible = bool((sums >= 0).all() and (counts >= 0).all() and (counts < _MOST_TOKENS).all())
        if not len(counts) or len(sums) % len(counts) or not (possible and np.isfinite(sums).all()):
            raise CheckpointError(
                f"{path}: {name} has {len(sums)} sums for {len(counts)} counts, or they are not sums of squares. "
                "Make the matrix again."
            )
        yield name, ColumnSquares(sums.reshape(len(counts), -1), np.rint(counts).astype(np.int64))
