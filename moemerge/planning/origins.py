"""The source files of a merge: their stamps, and which tensors are read more than once."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from moemerge.checkpoint.derived import derivation, leaves
from moemerge.checkpoint.files import File, Stamp, fingerprint_of, size_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import MergeConfig
from moemerge.errors import CheckpointError
from moemerge.planning.assembled import Assembled
from moemerge.planning.models import Models
from moemerge.planning.output import Output
from moemerge.planning.router_sources import router_reads
from moemerge.planning.shape import Shape

if TYPE_CHECKING:
    from moemerge.sources.stores import StoreFolder

# The fields of a stamp, in words.
_STAMPED: Final = {
    "size": "size",
    "modified": "time of writing",
    "changed": "time of a change of content, links or permissions",
    "inode": "inode",
}


@dataclass(frozen=True)
class Origins:
    """The files that a merge's weights come from."""

    stamps: Mapping[Path, Stamp]
    """Stamp of each local file when it was first read, by path."""
    references: Mapping[File, str]
    """Reference of the model that each file of weights belongs to, as the config writes it."""
    reread: tuple[TensorInfo, ...]
    """Tensors that are read more than once: for routers, for several output tensors, or to mix shared weights."""

    @property
    def remote_bytes(self) -> int:
        """Total size in bytes of the files of weights on other machines."""
        return sum(file.nbytes for file in self.references if not isinstance(file, Path))

    @property
    def kept_bytes(self) -> int:
        """Bytes from other machines that are kept on the disk until the merge ends, as they are read more than once."""
        return remote_bytes(self.reread)

    def fingerprint_of(self, file: File) -> dict[str, Any]:
        """Values that differ once a file has changed; for a local file, its stamp when it was first read."""
        if isinstance(file, Path) and file in self.stamps:
            return asdict(self.stamps[file])
        return {"size": size_of(file), "identity": str(fingerprint_of(file))}

    def check(self, when: str) -> None:
        """Check that every source file is still the same.

        Args:
            when: the time since which a file may have changed, in words for the message.

        Raises:
            CheckpointError: a file has changed; says what differs.
            SourceError: a store cannot be asked.
        """
        for path, seen in self.stamps.items():
            try:
                found = asdict(Stamp.of(path))
            except OSError as error:
                raise CheckpointError(f"{path}: is gone {when}. Put it back, and merge again.") from error
            if changed := [_STAMPED[name] for name, value in asdict(seen).items() if found[name] != value]:
                raise CheckpointError(
                    f"{path}: was changed {when}: another {' and '.join(changed)}. The output would be of two models. "
                    "Merge again."
                )
        for folder, names in self._in_stores().items():
            if name := folder.first_changed(names):
                raise CheckpointError(
                    f"{folder}/{name}: was changed {when}. The output would be of two models. Merge again."
                )

    def _in_stores(self) -> "dict[StoreFolder, list[str]]":
        """Names of the files of weights in object stores, by folder."""
        found: dict[StoreFolder, list[str]] = {}
        remote = [file for file in self.references if not isinstance(file, Path)]
        if not remote:
            return found
        from moemerge.sources.store_files import StoreFile

        for file in remote:
            if isinstance(file, StoreFile):
                found.setdefault(file.folder, []).append(file.name)
        return found


def origins_of(config: MergeConfig, models: Models, shape: Shape, assembled: Assembled) -> Origins:
    """Collect the files that are read for the output's tensors and for the routers."""
    parts, opened = assembled.parts, models.by_reference
    routed = parts.experts[: len(models.experts)]
    return Origins(
        stamps=MappingProxyType({path: stamp for folder in opened.values() for path, stamp in folder.stamps.items()}),
        references=MappingProxyType(
            {
                leaf.path: opened[name].name_of(leaf.path)
                for name, table in assembled.tables.items()
                for tensor in table.values()
                for leaf in leaves(tensor)
            }
        ),
        reread=(
            *router_reads(config, shape.mixture, parts.base, routed, runs_base=shape.runs_base),
            *(tensor for tensor in parts.base.tensors.values() if (made := derivation(tensor)) and made.rereads),
            *_repeated(assembled.outputs),
        ),
    )


def _repeated(outputs: Mapping[str, Output]) -> Iterator[TensorInfo]:
    """Yield the source tensors that several output tensors are made of, or whose recipe reads them once more."""
    pieces = [piece.source for output in outputs.values() for piece in output.pieces]
    sources = [source for source in pieces if isinstance(source, TensorInfo)]
    counted = Counter(leaf for source in sources for leaf in leaves(source))
    yield from (source for source in sources if (made := derivation(source)) and made.rereads)
    yield from (tensor for tensor, count in counted.items() if count > 1)


def remote_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Count the bytes of tensors that are on other machines; bytes that several tensors share count once."""
    spans: dict[File, list[tuple[int, int]]] = {}
    for leaf in chain.from_iterable(map(leaves, tensors)):
        if not isinstance(leaf.path, Path):
            spans.setdefault(leaf.path, []).append((leaf.start, leaf.start + leaf.nbytes))
    total = 0
    for found in spans.values():
        done = 0
        for start, end in sorted(found):
            total += max(0, end - max(start, done))
            done = max(done, end)
    return total
