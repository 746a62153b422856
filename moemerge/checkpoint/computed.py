"""Tensors that are made of others while they are read; to other code they are files."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from pathlib import Path

from moemerge.checkpoint.files import BlockReader, Reader, fingerprint_of
from moemerge.checkpoint.header import TensorInfo


class ComputedFile(ABC):
    """A file (`moemerge.checkpoint.files.RemoteFile`) that holds one tensor, made of others at each reading."""

    @property
    @abstractmethod
    def sources(self) -> tuple[TensorInfo, ...]:
        """The tensors that it is read from; the first one names it."""

    @property
    @abstractmethod
    def settings(self) -> tuple[object, ...]:
        """Everything, beside the sources, that sets its bytes apart from those of others of its class."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""

    @abstractmethod
    def blocks(self, start: int, end: int) -> Generator[bytes | memoryview, None, None]:
        """Yield the bytes from offset `start` to `end`; each block is valid until the next.

        Raises:
            CheckpointError: a file ends too early, or what it says cannot be computed.
            SourceError: a file on another machine cannot be reached.
        """

    def __repr__(self) -> str:
        return " and ".join(dict.fromkeys(str(tensor.path) for tensor in self.sources))

    @property
    def name(self) -> str:
        """The name of the file of the first source."""
        return self.sources[0].path.name

    @property
    def identity(self) -> str:
        """A hash of the settings, and of the place and the stamp or identity of each source."""
        sources = [(repr(tensor), fingerprint_of(tensor.path)) for tensor in self.sources]
        return hashlib.sha256(repr((type(self).__name__, self.settings, sources)).encode()).hexdigest()

    def keep(self, folder: Path, start: int, nbytes: int) -> None:
        """Keep the sources whole, whatever range is given."""
        del start, nbytes
        for tensor in self.sources:
            tensor.keep(folder)

    def open(self, start: int, nbytes: int) -> Reader:
        """Open `nbytes` bytes from offset `start` on; reading may raise what `blocks` says."""
        return BlockReader(self.blocks(start, start + nbytes))
