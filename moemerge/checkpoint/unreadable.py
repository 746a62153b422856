"""Entries of a model's table for tensors that cannot be read; they are refused only when a merge needs them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from moemerge.checkpoint.header import TensorInfo
from moemerge.errors import CheckpointError


@dataclass(frozen=True)
class Unreadable:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that gives the reason instead of bytes."""

    stored: TensorInfo
    """The entry that the file stores in the tensor's place; without bytes if there is none."""
    reason: str
    """The reason, as it follows the tensor's name in a message: `is sparse`."""
    is_tensor: bool = True
    """False for an entry that is not a tensor, so that nothing is lost without it."""

    def __str__(self) -> str:
        return str(self.stored.path)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.stored.path.name

    @property
    def nbytes(self) -> int:
        """Zero: no bytes can be read."""
        return 0

    @property
    def identity(self) -> str:
        """The reason that the tensor cannot be read."""
        return self.reason

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Do nothing: there is nothing to keep."""

    def open(self, start: int, nbytes: int) -> NoReturn:
        """Raise the reason, for callers that did not ask before.

        Raises:
            CheckpointError: always.
        """
        del start, nbytes
        raise CheckpointError(f"{self.stored.path}: tensor {self.stored.name!r} is needed, but {self.reason}.")

    def tensor(self, like: TensorInfo | None = None) -> TensorInfo:
        """A table entry with name, dtype and shape of another tensor, or of what is stored."""
        return replace(like or self.stored, path=self, start=0, nbytes=0)


class Resized(Unreadable):
    """As `Unreadable`, for a matrix of other rows than its model has: `stored` can be read, and has them."""


def reasons(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The reasons that some of a model's tensors cannot be read, by tensor name."""
    return {name: tensor.path.reason for name, tensor in tensors.items() if isinstance(tensor.path, Unreadable)}


def is_no_tensor(entry: TensorInfo) -> bool:
    """Whether a table entry stands for something that is not a tensor, so that nothing is lost without it."""
    return isinstance(entry.path, Unreadable) and not entry.path.is_tensor
