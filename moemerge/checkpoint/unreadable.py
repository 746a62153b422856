"""A tensor that cannot be read as what it is: it stands in a model's table until a merge needs it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from moemerge.checkpoint.header import TensorInfo
from moemerge.errors import CheckpointError


@dataclass(frozen=True)
class Unreadable:
    """A file (`moemerge.checkpoint.files.RemoteFile`) that gives no bytes, only the reason."""

    stored: TensorInfo
    """What lies in a file in its place; of no bytes where nothing does."""
    reason: str
    """What follows the tensor's name in a sentence: `is sparse`."""
    is_tensor: bool = True
    """False for what is no tensor at all, so that nothing is lost without it."""

    def __str__(self) -> str:
        return str(self.stored.path)

    @property
    def name(self) -> str:
        """Of the file."""
        return self.stored.path.name

    @property
    def nbytes(self) -> int:
        """None can be read."""
        return 0

    @property
    def identity(self) -> str:
        """The reason."""
        return self.reason

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """There is nothing to keep."""

    def open(self, start: int, nbytes: int) -> NoReturn:
        """Refuse, where nobody has asked before.

        Raises:
            CheckpointError: always.
        """
        del start, nbytes
        raise CheckpointError(f"{self.stored.path}: tensor {self.stored.name!r} is needed, but {self.reason}.")

    def tensor(self, like: TensorInfo | None = None) -> TensorInfo:
        """An entry of a table: with name, type and shape of another tensor, or of what is stored."""
        return replace(like or self.stored, path=self, start=0, nbytes=0)


def reasons(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Why some of a model's tensors cannot be read, by their names."""
    return {name: tensor.path.reason for name, tensor in tensors.items() if isinstance(tensor.path, Unreadable)}


def is_no_tensor(entry: TensorInfo) -> bool:
    """Whether an entry of a table stands for something else, so that nothing is lost without it."""
    return isinstance(entry.path, Unreadable) and not entry.path.is_tensor
