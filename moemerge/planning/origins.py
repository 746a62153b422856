"""The files that a merge reads of its models: what told them from others, and which are read more than once."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from moemerge.checkpoint.derived import derivation, leaves
from moemerge.checkpoint.files import File, Stamp, fingerprint_of, size_of
from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import MergeConfig
from moemerge.errors import CheckpointError
from moemerge.planning.models import Models
from moemerge.planning.output import Output
from moemerge.planning.router_inputs import router_reads
from moemerge.planning.shape import Shape
from moemerge.planning.tensors import Assembled

# What a stamp holds, in words.
_STAMPED: Final = {
    "size": "size",
    "modified": "time of writing",
    "changed": "time of a change of content, links or permissions",
    "inode": "inode",
}


@dataclass(frozen=True)
class Origins:
    """Where a merge's weights come from."""

    stamps: Mapping[Path, Stamp]
    """Of each local file that was read of the models, what told it from others when it was first read."""
    references: Mapping[File, str]
    """Of each file of weights, the model that it belongs to, as the config names it."""
    reread: tuple[TensorInfo, ...]
    """What is read more than once: for routers, for several tensors, or to find out how models are mixed."""

    @property
    def remote_bytes(self) -> int:
        """Size of the files of weights that are on other machines."""
        return sum(file.nbytes for file in self.references if not isinstance(file, Path))

    @property
    def kept_bytes(self) -> int:
        """Of them, the bytes that are kept on the disk until the end, for they are read more than once."""
        return remote_bytes(self.reread)

    def fingerprint_of(self, file: File) -> dict[str, Any]:
        """What a change of a file would change: of a local one the stamp that it had when it was planned with."""
        if isinstance(file, Path) and file in self.stamps:
            return asdict(self.stamps[file])
        return {"size": size_of(file), "identity": str(fingerprint_of(file))}

    def check(self, when: str) -> None:
        """Make sure that every file that was read of the models is still the same.

        Args:
            when: since when it may have changed, for the message.

        Raises:
            CheckpointError: one is not; says what of it is another.
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


def origins_of(config: MergeConfig, models: Models, shape: Shape, assembled: Assembled) -> Origins:
    """The files that are read for these tensors and for the routers."""
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
    """What several tensors of the output are made of."""
    pieces = (piece.source for output in outputs.values() for piece in output.pieces)
    counted = Counter(leaf for source in pieces if isinstance(source, TensorInfo) for leaf in leaves(source))
    yield from (tensor for tensor, count in counted.items() if count > 1)


def remote_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of those tensors that are on other machines; what several have in common counts once."""
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
