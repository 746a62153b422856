"""A dense model that is made of a mixture: the plan of its files, and how they are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from moemerge.checkpoint.derived import kinds_of, leaves
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Piece
from moemerge.checkpoint.shards import TensorSpec
from moemerge.checkpoint.unreadable import reasons
from moemerge.dtypes import CONFIG_DTYPES
from moemerge.editing.planned_model import PlannedModel, write_card_of, writing_model
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.families.expert_view import DenseView
from moemerge.model_card.edit_card import EditCard
from moemerge.planning.layout import divide
from moemerge.planning.options import PlanOptions
from moemerge.planning.origins import Origins, remote_bytes
from moemerge.planning.quantised_notes import was_stored_as
from moemerge.planning.tokenizer_files import find_base_files
from moemerge.planning.tokenizer_proof import ProvedTokenizer, prove_tokenizer
from moemerge.progress import Progress
from moemerge.sources.model_folder import Announce, ModelFolder

_MEMORY_BYTES: Final = 300_000_000


@dataclass(frozen=True, kw_only=True)
class DensePlan(PlannedModel):
    """A dense model made of a mixture, completely decided and immutable; nothing has been written yet."""

    what: str
    """What the model is, as a sentence for its card."""
    view: DenseView
    """Its config and tensors."""
    tokenizer: ProvedTokenizer
    """Files of the tokenizer that are written in place of copies."""

    @property
    def other_names(self) -> Sequence[str]:
        """Files of the tokenizer."""
        return tuple(self.tokenizer.files)

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        """What each tensor is made of, by name."""
        return {name: Piece(tensor, tensor.dtype) for name, tensor in self.view.tensors.items()}

    @property
    def parameters(self) -> int:
        """Number of parameters in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.view.tensors.values())

    @property
    def download_bytes(self) -> int:
        """Bytes that are read from other machines."""
        return remote_bytes(leaf for tensor in self.view.tensors.values() for leaf in leaves(tensor))


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
    quantised = [f"{folder.reference}: {was_stored_as(kind)}" for kind in kinds_of(view.tensors.values())]
    said = [note.replace("base_model", folder.reference, 1) for note in (*files.notes, *tokenizer.notes)]
    return DensePlan(
        what=what,
        sources=(folder,),
        view=view,
        output_config=view.config,
        layout=divide(specs, view.tensors, (), options),
        base_files=files,
        tokenizer=tokenizer,
        origins=Origins(dict(folder.stamps), {path: folder.name_of(path) for path in read}, ()),
        notes=tuple(dict.fromkeys([*folder.notes, *quantised, *notes, *said, *files.reader_notes])),
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
    with writing_model(plan, out, progress, overwrite=overwrite) as (stage, writer):
        writer.add({name: ((piece,),) for name, piece in plan.pieces.items()})
        for name, content in plan.tokenizer.files.items():
            (stage / name).write_bytes(content)
        write_card_of(plan, _card(plan), stage, out)


def _card(plan: DensePlan) -> EditCard:
    return EditCard(
        plan.view.model.family.model_type,
        plan.what,
        (plan.parameters, plan.parameters),
        notes=plan.notes,
        tags=("moemerge",),
    )
