"""Open one expert of a mixture as the dense model that it is: `MIXTURE#NAME`, `MIXTURE#3`, `MIXTURE#shared`."""

from dataclasses import replace
from typing import Literal

from moemerge.checkpoint.header import TensorInfo
from moemerge.errors import IncompatibleError, NoSuchModelError
from moemerge.families.expert_view import Chosen, dense_view
from moemerge.families.stored_mixture import number_of
from moemerge.sources.model_folder import Announce, ModelFolder, open_model
from moemerge.sources.stored_mixtures import read_stored_mixture


def open_expert(reference: str, mixture: str, name: str, announce: Announce) -> ModelFolder:
    """Open an expert of a mixture; the headers of the mixture's weights are read.

    Args:
        reference: the whole reference.
        mixture: the mixture's.
        name: the expert's name or number, or `shared`.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: the mixture cannot be reached, or has no such expert.
        IncompatibleError: it is no mixture that is read, or no dense model computes like the expert.
        CheckpointError: the mixture's files are damaged.
    """
    opened = open_model(mixture, announce)
    stored = read_stored_mixture(opened, announce, plain=True)
    chosen: int | str = "shared" if name == "shared" and name not in stored.names else number_of(name, stored)
    if isinstance(chosen, str) and chosen != "shared":
        raise NoSuchModelError(f"{reference}: {chosen}.")
    expert: Chosen = chosen if isinstance(chosen, int) else "shared"
    try:
        view = dense_view(stored, expert)
    except IncompatibleError as error:
        headline = str(error).partition("\n")[0]
        raise IncompatibleError(f"{reference}: {headline[0].lower()}{headline[1:]}", error.problems) from None
    opened.notes.extend(f"{reference}: {note}" for note in view.notes)
    return replace(opened, reference=reference, config=view.config, mixture=opened, expert=expert)


def expert_tensors(
    mixture: ModelFolder, expert: Chosen, announce: Announce, weights: Literal["download", "stream"]
) -> dict[str, TensorInfo]:
    """Read the tensor table of an expert as that of a dense model.

    Raises:
        SourceError: see `moemerge.sources.tensor_tables.read_tensor_table`.
        CheckpointError: see there.
        IncompatibleError: see `open_expert`.
    """
    return dense_view(read_stored_mixture(mixture, announce, weights, plain=True), expert).tensors
