"""The inputs of a GGUF file: config, tensors and small files of a checkpoint that is written, or only planned."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.shards import Shard
from moemerge.errors import CheckpointError, MoemergeError, RefusedError
from moemerge.export.blocks import GgufType
from moemerge.export.families import GgufFamily
from moemerge.export.family_tables import GGUF_FAMILIES
from moemerge.export.key_values import ACTIVATION, LENGTH_IGNORED, ROPES, lacks
from moemerge.export.layout import add_tensor_infos, lay_out
from moemerge.export.metadata import Described, add_metadata
from moemerge.export.tensors import Conversion, GgufTensor

AskedType = GgufType | Literal["auto"]
"""A type, or `auto` for the 16-bit floats that the checkpoint has, else float16."""
_EMBEDDINGS: Final = "model.embed_tokens.weight"
# Keys without which there is no model of any family.
_SIZES: Final = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


@dataclass(frozen=True)
class GgufFormat:
    """What a GGUF file is written in, and by whose converter."""

    type: AskedType = "auto"
    """Type of matrices; vectors, norms and routers are float32."""
    llama_cpp: Path | None = None
    """A checkout of llama.cpp, whose converter reads a tokenizer that is not known here."""


@dataclass(frozen=True)
class GgufModel:
    """A model to be written as a GGUF file, whether its checkpoint is written or only planned."""

    config: Mapping[str, Any]
    """The checkpoint's `config.json`."""
    type: GgufType
    """The type of the file's matrices."""
    checkout: Path | None = None
    """A checkout of llama.cpp, whose converter reads a tokenizer that is not known here."""

    @property
    def family(self) -> GgufFamily:
        """The model's family in llama.cpp.

        Raises:
            RefusedError: no family that can be written here.
        """
        model_type = str(self.config.get("model_type"))
        if model_type not in GGUF_FAMILIES:
            raise RefusedError(
                f"{model_type}: is not written as a GGUF file. Output families that are: {', '.join(GGUF_FAMILIES)}; "
                "choose one with `architecture:` in the config, if it can hold the merge."
            )
        return GGUF_FAMILIES[model_type]

    @property
    def notes(self) -> list[str]:
        """Notes on what llama.cpp computes wrongly of the model, though not in every text."""
        notes = (*self.family.notes, LENGTH_IGNORED)
        return [note.format(**self.config) for applies, note in notes if applies(self.config)]

    def check(self) -> None:
        """Refuse a model that llama.cpp does not load, or computes wrongly.

        Raises:
            RefusedError: says what; or the family is not written as a GGUF file.
            CheckpointError: `config.json` is not that of a model.
        """
        family = self.family
        for key in _SIZES:
            if type(self.config.get(key)) is not int or self.config[key] < 1:
                raise CheckpointError(f"config.json: {key} has to be a size, found {self.config.get(key)!r:.40}.")
        with _as_damaged("config.json"):
            reasons = [reason for applies, reason in (*family.refuses, *ROPES, ACTIVATION) if applies(self.config)]
            reasons = [reason for reason in reasons if reason not in family.knows] + lacks(family, self.config)
        if reasons:
            raise RefusedError(
                f"{self.config['model_type']}: is not written as a GGUF file, for llama.cpp {' and '.join(reasons)}. "
                "Merge again with `--for llama.cpp`, which chooses a family that it reads, if there is one."
            )

    def tensors(self, table: Mapping[str, TensorInfo]) -> list[GgufTensor]:
        """Make every tensor of the file from the checkpoint's.

        Raises:
            IncompatibleError: a tensor is missing, or would be dropped.
            RefusedError: see `check`.
            CheckpointError: see `check`.
        """
        self.check()
        rows = table[_EMBEDDINGS].shape[0] if _EMBEDDINGS in table else 0
        size, layers = self.config["vocab_size"], self.config["num_hidden_layers"]
        if size != rows or layers > len(table):
            raise CheckpointError(
                f"config.json: vocab_size {size} and {layers} layers, but there are {len(table)} tensors, and "
                f"{rows} rows in {_EMBEDDINGS}. Is a file missing?"
            )
        with _as_damaged("config.json"):
            return Conversion(self.family, self.config, self.type).tensors(table)

    def lay_out(self, tensors: Sequence[GgufTensor], described: Path, file: Path) -> Shard:
        """Build the header and layout of the file.

        Args:
            tensors: the tensors of the file.
            described: a folder with the model's small files, whose name is the model's.
            file: the file that the header is written to on the way.

        Raises:
            IncompatibleError: the tokenizer is not known.
            RefusedError: the converter does not know the tokenizer either.
            CheckpointError: one of the small files is damaged.
        """
        from gguf import GGUFWriter

        writer = GGUFWriter(None, self.family.architecture)
        add_tensor_infos(writer, tensors)
        model = Described(self.config, described, self.checkout)
        with _as_damaged("config.json, model card, generation_config.json or tokenizer"):
            add_metadata(writer, self.family, model, self.type, file)
            return lay_out(writer, tensors, file)


def asked_type(asked: AskedType, dtypes: Collection[str]) -> GgufType:
    """Choose the type of matrices by what was asked for and the checkpoint's dtypes as headers spell them."""
    if asked != "auto":
        return asked
    return "bf16" if "BF16" in dtypes else "f16"


@contextmanager
def _as_damaged(files: str) -> Iterator[None]:
    """Turn any error from small files, which may hold anything, into a message that they are damaged.

    Raises:
        CheckpointError: quotes the error.
    """
    try:
        yield
    except (MoemergeError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{files}: holds what cannot be read, or written to a GGUF file ({type(error).__name__}: {error!s:.80}). "
            "Look at what differs from the released models of its family."
        ) from error
