"""A dense model that is made of a mixture: the plan of its files, and how they are written."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from moemerge.checkpoint.copy import copy_file
from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.index import SAFETENSORS_INDEX
from moemerge.checkpoint.jobs import CONNECTIONS, MAX_THREADS
from moemerge.checkpoint.output_folder import check_limits, check_space, check_target
from moemerge.checkpoint.pieces import Piece
from moemerge.checkpoint.shards import Shard, TensorSpec
from moemerge.checkpoint.staging import left_bytes, staged
from moemerge.checkpoint.unreadable import reasons
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config.schema import CARD
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.families.expert_view import DenseView
from moemerge.merging.overwriting import replaceable_files
from moemerge.model_card.edit_card import EditCard, write_edit_card
from moemerge.model_card.metadata import licence_of
from moemerge.planning.layout import Layout, divide
from moemerge.planning.options import PlanOptions
from moemerge.planning.origins import Origins, remote_bytes
from moemerge.planning.tokenizer_files import BaseFiles, find_base_files
from moemerge.planning.tokenizer_proof import ProvedTokenizer, prove_tokenizer
from moemerge.progress import Progress, Task, adding_up
from moemerge.sources.model_folder import Announce, ModelFolder

_MEMORY_BYTES: Final = 300_000_000


@dataclass(frozen=True)
class DensePlan:
    """A dense model made of a mixture, completely decided and immutable; nothing has been written yet."""

    what: str
    """What the model is, as a sentence for its card."""
    folder: ModelFolder
    """The mixture's folder."""
    view: DenseView
    """Its config and tensors."""
    layout: Layout
    """The files of weights."""
    files: BaseFiles
    """The files that are copied from the mixture beside its weights."""
    tokenizer: ProvedTokenizer
    """Files of the tokenizer that are written in place of copies."""
    origins: Origins
    """The files that the weights come from."""
    notes: tuple[str, ...]
    """Facts that the user should know."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of weights."""
        return self.layout.shards

    @property
    def shared_bytes(self) -> int:
        """Bytes of the weights that take no space on the disk, since the file system shares them with the mixture."""
        return self.layout.shared_bytes

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        """What each tensor is made of, by name."""
        return {name: Piece(tensor, tensor.dtype) for name, tensor in self.view.tensors.items()}

    @property
    def parameters(self) -> int:
        """Number of parameters in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.view.tensors.values())

    @property
    def output_bytes(self) -> int:
        """Size of the model in bytes, copied files included."""
        return self.layout.weight_bytes + sum(path.stat().st_size for path in self.files.copied.values())

    @property
    def download_bytes(self) -> int:
        """Bytes that are read from other machines."""
        return remote_bytes(leaf for tensor in self.view.tensors.values() for leaf in leaves(tensor))

    @property
    def file_names(self) -> list[str]:
        """Paths in the output of all files that are written."""
        others = ["config.json", CARD, *self.files.copied, *self.tokenizer.files]
        return [*self.layout.file_names, *others]

    @property
    def inputs(self) -> list[Path]:
        """Files that are read, among them those that links may lead to."""
        read = (*self.origins.stamps, *self.origins.references, *self.files.copied.values())
        return [path for path in read if isinstance(path, Path)]


def plan_dense(
    what: str,
    folder: ModelFolder,
    view: DenseView,
    *,
    options: PlanOptions,
    announce: Announce,
    notes: Sequence[str] = (),
) -> DensePlan:
    """Plan the files of a dense model that is made of a mixture; tokenizers may be compared in a process of their own.

    Args:
        what: what it is, as a sentence for its card.
        folder: the mixture's folder.
        view: the model's config and tensors.
        options: the size of files, and the folder that will be written.
        announce: called with a line about each step that takes long.
        notes: what to say beside the notes on the folder, of which an expert's view are some.

    Raises:
        IncompatibleError: its tensors cannot be read, or are quantised; lists them.
        RefusedError: the model would read text otherwise than the mixture.
        SourceError: the Hub does not give a file.
        CheckpointError: a file is damaged.
    """
    _check_tensors(folder.reference, view.tensors)
    files = find_base_files(folder, announce, needed=False)
    try:
        tokenizer = prove_tokenizer(files, view.config, in_process=False)
    except RefusedError as error:
        raise RefusedError(str(error).replace("base_model", folder.reference, 1)) from error
    specs = [TensorSpec(name, t.dtype, t.shape, t.nbytes) for name, t in view.tensors.items()]
    read = {leaf.path for tensor in view.tensors.values() for leaf in leaves(tensor)}
    said = [note.replace("base_model", folder.reference, 1) for note in (*files.notes, *tokenizer.notes)]
    return DensePlan(
        what=what,
        folder=folder,
        view=view,
        layout=divide(specs, view.tensors, (), options),
        files=files,
        tokenizer=tokenizer,
        origins=Origins(dict(folder.stamps), {path: folder.name_of(path) for path in read}, ()),
        notes=tuple(dict.fromkeys([*folder.notes, *notes, *said, *files.reader_notes])),
    )


def _check_tensors(reference: str, tensors: Mapping[str, TensorInfo]) -> None:
    lost = reasons(tensors)
    lost |= {
        name: f"is stored as {tensor.dtype}; expected one of {', '.join(CONFIG_DTYPES.values())}"
        for name, tensor in tensors.items()
        if tensor.dtype not in CONFIG_DTYPES and name not in lost
    }
    if lost:
        problems = [f"tensor {name} {reason}" for name, reason in lost.items()]
        raise IncompatibleError(f"{reference}: cannot be made a dense model:", problems)


def check_dense(plan: DensePlan, out: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written, or that would lose files; leaves nothing on the disk.

    Raises:
        RefusedError: something would be lost.
        OutputError: the folder cannot be written.
    """
    replaceable = partial(replaceable_files, written=plan.file_names) if overwrite else None
    check_target(out, plan.folder.folders, inputs=plan.inputs, replaceable=replaceable)
    check_space(out, plan.output_bytes - plan.shared_bytes, left=left_bytes(out), what="the dense model")
    check_limits(out, largest=max(shard.nbytes for shard in plan.shards), memory=_MEMORY_BYTES)


def write_dense(
    plan: DensePlan,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda _task, _done, _total: None,
) -> None:
    """Write the dense model; the folder is complete when this returns, and untouched when it raises.

    Args:
        plan: the plan.
        out: the folder.
        overwrite: whether to replace a model that is there.
        progress: called as the work goes on.

    Raises:
        RefusedError: something would be lost.
        OutputError: the disk is full or cannot be written.
        CheckpointError: a source is not what its header said.
    """
    check_dense(plan, out, overwrite=overwrite)
    plan.origins.check("since the plan was made")
    replaceable = partial(replaceable_files, written=plan.file_names) if overwrite else None
    report = adding_up(partial(progress, Task("weights")), plan.layout.tensor_bytes)
    threads = CONNECTIONS if plan.download_bytes else MAX_THREADS
    with staged(out, plan.folder.folders, inputs=plan.inputs, replaceable=replaceable) as stage:
        with ShardWriter(stage, plan.shards, report, threads=threads, reserve=not plan.shared_bytes) as writer:
            writer.add({name: ((piece,),) for name, piece in plan.pieces.items()})
            _write_other_files(plan, stage, out)  # while bytes are copied
        plan.origins.check("while it was read")
        (stage / "config.json").write_text(json.dumps(plan.view.config, indent=2) + "\n", encoding="utf-8")


def _write_other_files(plan: DensePlan, folder: Path, final: Path) -> None:
    for name, path in plan.files.copied.items():
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(path, folder / name)
    for name, content in plan.tokenizer.files.items():
        (folder / name).write_bytes(content)
    if (index := plan.layout.index) is not None:
        (folder / SAFETENSORS_INDEX).write_text(index, encoding="utf-8")
    card = EditCard(
        plan.view.model.family.model_type,
        plan.what,
        (plan.parameters, plan.parameters),
        notes=plan.notes,
        tags=("moemerge",),
    )
    licence = None
    with suppress(RefusedError):  # only who publishes the model has to say
        licence = licence_of([plan.folder])
    write_edit_card(folder, final.resolve().name, card, [plan.folder], licence)
