"""What all models that are made of a mixture have in common: how their files are planned, checked and written."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.copy import copy_file
from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS
from moemerge.checkpoint.output_folder import check_limits, check_space, check_target
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import left_bytes, staged
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config.schema import CARD
from moemerge.errors import RefusedError
from moemerge.merging.overwriting import replaceable_files
from moemerge.model_card.edit_card import EditCard, write_edit_card
from moemerge.model_card.metadata import licence_of
from moemerge.planning.layout import Layout
from moemerge.planning.origins import Origins
from moemerge.planning.tokenizer_files import BaseFiles
from moemerge.progress import Progress, Task, adding_up
from moemerge.sources.model_folder import ModelFolder

# A pass of the mixture aside, bytes are moved.
_MEMORY_BYTES: Final = 300_000_000


@dataclass(frozen=True, kw_only=True)
class PlannedModel(ABC):
    """A model whose files are completely decided; nothing has been written yet."""

    sources: tuple[ModelFolder, ...]
    """The mixture, then the models of added experts."""
    output_config: Mapping[str, Any]
    """The `config.json` of the result."""
    layout: Layout
    """The files of weights."""
    base_files: BaseFiles
    """The files that are copied from the mixture beside its weights."""
    origins: Origins
    """The files that the weights come from."""
    notes: tuple[str, ...]
    """Facts that the user should know."""

    @property
    @abstractmethod
    def download_bytes(self) -> int:
        """Bytes that are read from other machines."""

    @property
    def other_names(self) -> Sequence[str]:
        """Paths in the output of files beside weights, copies, card and `config.json`."""
        return ()

    @property
    def folder(self) -> ModelFolder:
        """The mixture's folder."""
        return self.sources[0]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of weights."""
        return self.layout.shards

    @property
    def shared_bytes(self) -> int:
        """Bytes of the weights that take no space on the disk, since the file system shares them with the sources."""
        return self.layout.shared_bytes

    @property
    def output_bytes(self) -> int:
        """Size of the result in bytes, copied files included."""
        return self.layout.weight_bytes + sum(path.stat().st_size for path in self.base_files.copied.values())

    @property
    def folders(self) -> list[Path]:
        """Folders of the sources; for a snapshot in the Hub's cache, the folder of its repository."""
        return [folder for source in self.sources for folder in source.folders]

    @property
    def inputs(self) -> list[Path]:
        """Files that are read, among them those that links may lead to."""
        read = (*self.origins.stamps, *self.origins.references, *self.base_files.copied.values())
        return [path for path in read if isinstance(path, Path)]

    @property
    def file_names(self) -> list[str]:
        """Paths in the output of all files that may be written."""
        return [*self.layout.file_names, "config.json", CARD, *self.base_files.copied, *self.other_names]


def check_model(plan: PlannedModel, out: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that the model could not be written into, or that would lose files; leaves nothing on the disk.

    Raises:
        RefusedError: something would be lost.
        OutputError: the folder cannot be written.
    """
    replaceable = partial(replaceable_files, written=plan.file_names) if overwrite else None
    check_target(out, plan.folders, inputs=plan.inputs, replaceable=replaceable)
    check_space(out, plan.output_bytes - plan.shared_bytes, left=left_bytes(out), what="the model")
    check_limits(out, largest=max(shard.nbytes for shard in plan.shards), memory=_MEMORY_BYTES)


@contextmanager
def writing_model(
    plan: PlannedModel, out: Path, progress: Progress, *, overwrite: bool = False, seed: int = 0
) -> Iterator[tuple[Path, ShardWriter]]:
    """A context in which a model's tensors and further files are added; `out` is complete after it, or untouched.

    Args:
        plan: the plan.
        out: the folder.
        progress: called as bytes are written.
        overwrite: whether to replace a model that is there.
        seed: the seed of noise.

    Yields:
        A folder that takes the place of `out`, for further files beside the index, copied files and `config.json`, and
        the writer of the weights.

    Raises:
        RefusedError: something would be lost.
        OutputError: the disk is full or cannot be written.
        CheckpointError: a source is not what its header said.
    """
    check_model(plan, out, overwrite=overwrite)
    plan.origins.check("since the plan was made")
    replaceable = partial(replaceable_files, written=plan.file_names) if overwrite else None
    report = adding_up(partial(progress, Task("weights")), plan.layout.tensor_bytes)
    threads, reserve = CONNECTIONS if plan.download_bytes else MAX_THREADS, not plan.shared_bytes
    with staged(out, plan.folders, inputs=plan.inputs, replaceable=replaceable) as stage:
        with ShardWriter(stage, plan.shards, report, seed=seed, threads=threads, reserve=reserve) as writer:
            for name, path in plan.base_files.copied.items():
                (stage / name).parent.mkdir(exist_ok=True)
                copy_file(path, stage / name)
            if (index := plan.layout.index) is not None:
                (stage / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
            yield stage, writer
        plan.origins.check("while it was read")
        (stage / "config.json").write_text(json.dumps(plan.output_config, indent=2) + "\n", encoding="utf-8")


def write_card_of(plan: PlannedModel, card: EditCard, folder: Path, final: Path) -> None:
    """Write a model's card into a folder that will be called `final`."""
    licence = None
    with suppress(RefusedError):  # only who publishes the model has to say
        licence = licence_of(plan.sources)
    write_edit_card(folder, final.resolve().name, card, plan.sources, licence)
