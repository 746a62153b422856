"""A GGUF file written: staged beside its name, flushed, and renamed when it is complete."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from moemerge.checkpoint.copy import write_failure
from moemerge.checkpoint.disk import flush
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.jobs import MAX_THREADS
from moemerge.checkpoint.shards import Shard
from moemerge.checkpoint.staging import staged
from moemerge.checkpoint.target import check_space, check_writable
from moemerge.checkpoint.writer import ShardWriter
from moemerge.errors import RefusedError, TooLargeError
from moemerge.export.blocks import GgufType
from moemerge.export.converter import check_checkout
from moemerge.export.families import GgufFamily
from moemerge.export.family_tables import GGUF_FAMILIES
from moemerge.export.keys import rope_factors
from moemerge.export.layout import add_tensor_infos, lay_out, padded_bands
from moemerge.export.metadata import Described, add_metadata
from moemerge.export.packages import need
from moemerge.export.tensors import Conversion, GgufTensor
from moemerge.sources import read_tensor_table
from moemerge.verification import open_merged

SUFFIX: Final = ".gguf"
STAGED: Final = f"model{SUFFIX}"
"""What the file is called in its stage."""
AskedType = GgufType | Literal["auto"]
ASKED_TYPES: Final[dict[str, AskedType]] = {"auto": "auto", "f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
"""What is written here; all others llama.cpp makes of these."""
"""`auto` is the 16-bit floats that the checkpoint has, else float16."""
_MAGIC: Final = b"GGUF"
HEADER_BYTES: Final = 50_000_000
"""What keys and a vocabulary take at most, with room to spare."""


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file is made of, whether its checkpoint is written or only planned."""

    config: Mapping[str, Any]
    """The checkpoint's `config.json`."""
    type: GgufType
    """What matrices of the file are stored as."""
    checkout: Path | None = None
    """Of llama.cpp, whose converter reads a tokenizer that is not known here."""

    @property
    def family(self) -> GgufFamily:
        """What llama.cpp knows it as.

        Raises:
            RefusedError: nothing that can be written here.
        """
        model_type = str(self.config.get("model_type"))
        if model_type not in GGUF_FAMILIES:
            raise RefusedError(
                f"{model_type}: is not written as a GGUF file. Output families that are: {', '.join(GGUF_FAMILIES)}; "
                "choose one with `architecture:` in the config, or use llama.cpp's own converter."
            )
        family = GGUF_FAMILIES[model_type]
        reasons = [reason for applies, reason in family.refuses if applies(self.config)]
        if rope_factors(self.config) is not None and not family.slows_waves:
            reasons.append("knows no llama3 scaling of its rotary positions")
        if reasons:
            raise RefusedError(
                f"{model_type}: is not written as a GGUF file, for llama.cpp {' and '.join(reasons)}. "
                "Choose another family with `architecture:` in the config."
            )
        return family

    def tensors(self, table: Mapping[str, StoredTensor]) -> list[GgufTensor]:
        """Every tensor of the file, made of the checkpoint's.

        Raises:
            IncompatibleError: a tensor is missing, or would be dropped.
            RefusedError: the family is not written as a GGUF file.
        """
        return Conversion(self.family, self.config, self.type).tensors(table)

    def lay_out(self, tensors: Sequence[GgufTensor], described: Path, file: Path) -> Shard:
        """Header and layout of the file.

        Args:
            tensors: of it.
            described: a folder with the model's small files, whose name is the model's.
            file: where the header is written meanwhile.

        Raises:
            IncompatibleError: the tokenizer is not known.
            RefusedError: nor does the converter know it.
            CheckpointError: one of the small files is damaged.
        """
        from gguf import GGUFWriter

        writer = GGUFWriter(None, self.family.architecture)
        add_tensor_infos(writer, tensors)
        model = Described(self.config, described, self.checkout)
        add_metadata(writer, self.family, model, self.type, file)
        return lay_out(writer, tensors, file)


def asked_type(asked: AskedType, dtypes: Collection[str]) -> GgufType:
    """What matrices are stored as, by what was asked for and the checkpoint's dtypes as headers spell them."""
    if asked != "auto":
        return asked
    return "bf16" if "BF16" in dtypes else "f16"


def write_gguf(
    checkpoint: Path | str, file: Path | str, *, type: AskedType = "auto",  # noqa: A002  as the option is called
    overwrite: bool = False, low_memory: bool = False, llama_cpp: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:  # fmt: skip
    """Write a merged checkpoint as one GGUF file, in bounded memory: complete when this returns, absent when it raises.

    Args:
        checkpoint: its folder.
        file: the file.
        type: what matrices are stored as; vectors, norms and routers are float32.
        overwrite: replace a GGUF file of this name.
        low_memory: one copying thread, small chunks, and neither file left in the page cache.
        llama_cpp: a checkout of llama.cpp, whose converter reads a tokenizer that is not known here.
        progress: called with the bytes written and all there are.

    Raises:
        RefusedError: the family or its tokenizer is not written as a GGUF file, or the file is there already.
        SourceError: there is no such folder.
        CheckpointError: the checkpoint is damaged.
        OutputError: the disk is full or cannot be written.
    """
    file, folder = Path(file), Path(checkpoint)
    check_file(file, overwrite=overwrite)
    if llama_cpp is not None:
        check_checkout(llama_cpp)
    model = open_merged(folder)
    table = read_tensor_table(model, lambda _: None)
    matrices = {tensor.dtype for tensor in table.values() if len(tensor.shape) > 1}
    gguf = GgufModel(model.config, asked_type(type, matrices), llama_cpp)
    tensors = gguf.tensors(table)
    check_room(file, tensors)
    with staged_file(file, overwrite=overwrite) as stage, advising_types():
        shard = gguf.lay_out(tensors, folder.resolve(), stage / STAGED)
        with tensor_writer(stage, shard, progress, low_memory=low_memory) as writer:
            writer.add(padded_bands(tensors))


def check_file(file: Path, *, overwrite: bool, inputs: Collection[Path] = ()) -> None:
    """Refuse a file that cannot be written, or that would be lost; the `gguf` package has to be there too.

    Args:
        file: the file.
        overwrite: whether it may be replaced, if it is a GGUF file.
        inputs: what is read, and is not to be replaced.

    Raises:
        RefusedError: says why.
        OutputError: the system does not let it be written.
    """
    need("gguf", "To write a GGUF file")
    if file.suffix != SUFFIX:
        raise RefusedError(f"{file}: the name of a GGUF file ends in {SUFFIX}.")
    check_writable(file)
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


def check_room(file: Path, tensors: Sequence[GgufTensor]) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    check_space(file.parent, sum(tensor.nbytes for tensor in tensors) + HEADER_BYTES)


@contextmanager
def staged_file(file: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write `STAGED` into; when the block ends without an error it becomes `file`, which is checked again.

    Raises:
        RefusedError: see `check_file`.
        BusyError: another process is writing it.
        OutputError: it cannot be written.
    """
    with staged(file, temporary=True) as stage:
        yield stage
        check_file(file, overwrite=overwrite)
        try:
            flush(stage / STAGED)
            (stage / STAGED).replace(file)
            flush(file.resolve().parent)
        except OSError as error:
            raise write_failure(file, error) from error


@contextmanager
def advising_types() -> Iterator[None]:
    """Where a number is too large for a type of the file, name types that hold it."""
    try:
        yield
    except TooLargeError as error:
        raise TooLargeError(error.what, "Write the file with --type bf16 or --type f32") from error


def tensor_writer(stage: Path, shard: Shard, progress: Callable[[int, int], None], *, low_memory: bool) -> ShardWriter:
    """What writes a file's tensors; `progress` is called with the bytes written and all there are."""
    done, total = 0, shard.nbytes - len(shard.header)

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return ShardWriter(stage, [shard], report, low_memory=low_memory, threads=1 if low_memory else MAX_THREADS)
