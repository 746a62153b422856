"""Write a GGUF file: staged beside its name, flushed, and renamed when it is complete."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from moemerge.checkpoint.copy import write_failure
from moemerge.checkpoint.disk import flush
from moemerge.checkpoint.jobs import MAX_THREADS
from moemerge.checkpoint.output_folder import check_limits, check_scratch, check_space
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import left_bytes, staged
from moemerge.checkpoint.writer import ShardWriter
from moemerge.config.loading import load_config
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import ConfigError, RefusedError, TooLargeError
from moemerge.export.converter import check_checkout
from moemerge.export.layout import padded_bands
from moemerge.export.model import GgufFormat, GgufModel, asked_type
from moemerge.export.tensors import GgufTensor
from moemerge.packages import need
from moemerge.planning.models import references_of
from moemerge.planning.vision import left_out_in_words
from moemerge.progress import adding_up
from moemerge.sources.model_folder import ModelFolder, open_merged
from moemerge.sources.reference import local_folders
from moemerge.sources.tensor_tables import read_tensor_table

SUFFIX: Final = ".gguf"
STAGED: Final = f"model{SUFFIX}"
"""Name of the file in its stage."""
_MAGIC: Final = b"GGUF"
_MODEL_CONFIGS: Final = ("config.json", "adapter_config.json")
HEADER_BYTES: Final = 50_000_000
"""The most bytes that keys and a vocabulary take, with a margin."""
MEMORY_BYTES: Final = 100_000_000
"""Memory in bytes that writing a file from a checkpoint takes, whatever its size."""


class SpaceCheck(Protocol):
    """The signature of `check_room`: a check that the disk has enough space."""

    def __call__(self, file: Path, tensors: Sequence[GgufTensor], more: int = 0, memory: int = MEMORY_BYTES) -> None:
        """Refuse to begin if the disk has too little space, or limits of this process would end the work."""


def check_room(
    file: Path,
    tensors: Sequence[GgufTensor],
    more: int = 0,
    memory: int = MEMORY_BYTES,
    *,
    what: str = "the merged model",
) -> None:
    """Refuse to begin if the disk has too little space, or limits of this process (`ulimit`) would end the work.

    Args:
        file: the file to write.
        tensors: the tensors that it will hold.
        more: bytes that are needed beside it.
        memory: bytes that the work is expected to take.
        what: what is written, for the message.

    Raises:
        OutputError: says how much is needed and how much is free, or which limit is too low.
    """
    nbytes = sum(tensor.nbytes for tensor in tensors) + HEADER_BYTES
    check_space(file, nbytes + more, left=left_bytes(file), what=what)
    check_limits(file, largest=nbytes, memory=memory, in_shards=False)


@dataclass(frozen=True)
class GgufOptions(GgufFormat):
    """Options of `write_gguf`."""

    overwrite: bool = False
    """Whether a GGUF file of this name is replaced."""
    low_memory: bool = False
    """Whether to use one copying thread and small chunks, and to leave neither file in the page cache."""


def write_gguf(
    checkpoint: Path | str,
    file: Path | str,
    options: GgufOptions = GgufOptions(),
    *,
    room: SpaceCheck = check_room,
    tell: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write a merged checkpoint as one GGUF file, in bounded memory: complete when this returns, absent when it raises.

    Args:
        checkpoint: the folder of the checkpoint.
        file: the file to write.
        options: the options of the file.
        room: the check that the disk has enough space.
        tell: called with what llama.cpp gets wrong of the model, and with what of it has no place in the file.
        progress: called with the bytes written and all there are.

    Raises:
        RefusedError: the family or its tokenizer is not written as a GGUF file, or the file is there already.
        SourceError: there is no such folder.
        CheckpointError: the checkpoint is damaged.
        OutputError: the disk is full or cannot be written, or a limit of this process is too low.
    """
    file, folder = Path(file), Path(checkpoint)
    check_file(file, overwrite=options.overwrite, sources=sources_of(folder))
    if options.llama_cpp is not None:
        check_checkout(options.llama_cpp)
    opened = open_merged(folder)
    table = read_tensor_table(opened, lambda _: None)
    matrices = {tensor.dtype for tensor in table.values() if len(tensor.shape) > 1}
    model = GgufModel(opened.config, asked_type(options.type, matrices), options.llama_cpp)
    tensors = model.tensors(table)
    for note in (*model.notes, *_left_out(opened)):
        tell(f"{folder}: {note}")
    room(file, tensors)
    with staged_file(file, overwrite=options.overwrite) as stage, advising_types():
        shard = model.lay_out(tensors, folder.resolve(), stage / STAGED)
        with tensor_writer(stage, shard, progress, low_memory=options.low_memory) as writer:
            writer.add(padded_bands(tensors))


def _left_out(model: ModelFolder) -> Iterator[str]:
    """Say which tensors of a multimodal model are no part of its text model, which a GGUF file holds alone."""
    if model.left_out:
        apart = (
            "The file reads text alone; llama.cpp keeps towers in a second file (mmproj), which moemerge does not write"
        )
        yield f"beside the text model, {left_out_in_words(model.left_out)}. {apart}"


def sources_of(folder: Path) -> list[Path]:
    """Find the folders of the models that a merged model was made of, where the copy of its config leads to them."""
    try:
        config = load_config(folder / CONFIG_COPY, allow_identical_experts=True)
    except ConfigError:
        return []
    found = (folder for _, reference in references_of(config) for folder in local_folders(reference))
    return [folder for folder in found if any((folder / name).is_file() for name in _MODEL_CONFIGS)]


def check_file(file: Path, *, overwrite: bool, inputs: Collection[Path] = (), sources: Collection[Path] = ()) -> None:
    """Refuse a file that cannot be written, or that would be lost; the `gguf` package has to be there too.

    Args:
        file: the file to write.
        overwrite: whether it may be replaced, if it is a GGUF file.
        inputs: files that are read and must not be replaced.
        sources: folders of models that are read, into which nothing is written.

    Raises:
        RefusedError: says why.
        OutputError: the system does not let it be written.
    """
    need("gguf", "To write a GGUF file")
    if file.suffix != SUFFIX:
        raise RefusedError(f"{file}: the name of a GGUF file ends in {SUFFIX}.")
    check_scratch(file, sources)
    if not os.path.lexists(file):
        return
    if not file.is_file():
        raise RefusedError(f"{file}: exists and is not a file. Choose another name.")
    if file.resolve() in {path.resolve() for path in inputs}:
        raise RefusedError(f"{file}: is read for this merge. Choose another name.")
    if not overwrite:
        raise RefusedError(f"{file}: exists. Replace it with --overwrite, or choose another name.")
    with file.open("rb") as found:
        magic = found.read(len(_MAGIC))
    if magic != _MAGIC:
        raise RefusedError(f"{file}: is no GGUF file, and --overwrite replaces no other. Choose another name.")


@contextmanager
def staged_file(file: Path, *, overwrite: bool) -> Iterator[Path]:
    """A context with a folder to write `STAGED` into; at its end without an error the checked file becomes `file`.

    Raises:
        RefusedError: see `check_file`.
        BusyError: another process is writing it.
        OutputError: the file cannot be written.
    """
    target = file.resolve()  # a link stays one
    with staged(file, temporary=True) as stage:
        yield stage
        check_file(file, overwrite=overwrite)
        try:
            flush(stage / STAGED)
            (stage / STAGED).replace(target)
            flush(target.parent)
        except OSError as error:
            raise write_failure(file, error) from error


@contextmanager
def advising_types() -> Iterator[None]:
    """A context that adds advice on larger types to the error for a number that is too large."""
    try:
        yield
    except TooLargeError as error:
        raise TooLargeError(error.what, "Write the file with --type bf16 or --type f32") from error


def tensor_writer(stage: Path, shard: Shard, progress: Callable[[int, int], None], *, low_memory: bool) -> ShardWriter:
    """Open the writer of a file's tensors; `progress` is called with the bytes written and all there are."""
    return ShardWriter(
        stage,
        [shard],
        adding_up(progress, shard.tensor_bytes),
        low_memory=low_memory,
        threads=1 if low_memory else MAX_THREADS,
    )
