"""A model in one GGUF file, or in several that it is split into: its settings, and its tensors under their names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from moemerge.checkpoint.derived import kinds_of
from moemerge.checkpoint.files import File
from moemerge.checkpoint.gguf_blocks import read_tensor
from moemerge.checkpoint.gguf_contents import GgufContents, read_contents
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.regrouped import Heads, Regrouped
from moemerge.dtypes import DType
from moemerge.errors import CheckpointError, NoSuchModelError
from moemerge.sources.gguf.architectures import ARCHITECTURES, WHOLE, Architecture

_IN_LAYER: Final = re.compile(r"blk\.(\d+)\.(.+)")
# What they say is in config.json.
_SETTINGS: Final = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
_HEADS: Final = {"attn_q.": "attention.head_count", "attn_k.": "attention.head_count_kv"}
_MIXTURE: Final = "expert_count"


@dataclass(frozen=True)
class GgufModel:
    """A dense model in GGUF."""

    reference: str
    """The reference as the config writes it."""
    files: tuple[GgufContents, ...]
    """The file, or the files that it is split into."""
    snapshot: Path | None = None
    """For a repository on the Hub, the folder of its small files in the Hub's cache."""
    names: tuple[str, ...] = ()
    """For a repository on the Hub, the names of the files."""

    @property
    def first(self) -> GgufContents:
        """The file with the settings."""
        return self.files[0]

    @property
    def name(self) -> str:
        """llama.cpp's name of its family."""
        return self.first.architecture

    @property
    def architecture(self) -> Architecture:
        """Its family."""
        return ARCHITECTURES[self.name]

    @cached_property
    def own_settings(self) -> Mapping[str, Any]:
        """Settings of the model itself, without the family's name in front; arrays of numbers among them.

        A number in float32 is the shortest that is rounded to it: 1e-05, not 9.999999747378752e-06.
        """
        prefix = f"{self.name}."
        found = dict(self.first.settings)
        found |= {key: tuple(self.first.values(key)) for key in self.first.arrays if key.startswith(prefix)}
        return {key.removeprefix(prefix): _shortest(value) for key, value in found.items() if key.startswith(prefix)}

    @cached_property
    def stored(self) -> Mapping[str, TensorInfo]:
        """Tensors by their names in the file, dequantised, with rows in the file's order."""
        return {name: read_tensor(file, tensor) for file in self.files for name, tensor in file.tensors.items()}

    @property
    def kinds(self) -> list[str]:
        """The types of quantised numbers in it."""
        return kinds_of(self.stored.values())

    @property
    def usual_dtype(self) -> DType | None:
        """The dtype that a quantised model usually has before it is quantised; None for one that is not."""
        return "bfloat16" if self.kinds else None

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its name in transformers; one without a place there keeps its own."""
        found = {self._name(name): self._in_order(name, stored) for name, stored in self.stored.items()}
        return {name: replace(tensor, name=name) for name, tensor in found.items() if name not in _SETTINGS}

    def _name(self, name: str) -> str:
        if match := _IN_LAYER.fullmatch(name):
            inside = self.architecture.layer.get(match[2])
            return f"model.layers.{int(match[1])}.{inside}" if inside else name
        return WHOLE.get(name, name)

    def _in_order(self, name: str, stored: TensorInfo) -> TensorInfo:
        match = _IN_LAYER.fullmatch(name)
        key = next((key for part, key in _HEADS.items() if match and match[2].startswith(part)), "")
        if not key or not self.architecture.turned:
            return stored
        heads = self.own_settings.get(key) or self.own_settings[_HEADS["attn_q."]]
        rows = stored.shape[0]
        if not isinstance(heads, int) or rows % (2 * heads):
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} has {rows} rows, which are no pairs in each of {heads} heads."
            )
        return Regrouped(stored, Heads(rows // heads, rows // heads)).tensor()


def read_gguf(reference: str, files: Sequence[File]) -> GgufModel:
    """Read the headers of a model's GGUF files.

    Raises:
        NoSuchModelError: its family is not read, or it is a mixture.
        SourceError: a file cannot be read.
        CheckpointError: a file is damaged, or two hold one tensor.
    """
    found = GgufModel(reference, tuple(read_contents(file) for file in files))
    name, names = found.name, [name for file in found.files for name in file.tensors]
    if found.own_settings.get(_MIXTURE):
        raise NoSuchModelError(
            f"{reference}: is a mixture in GGUF (architecture {name!r}), of which dense models alone are read. Name "
            "the model that it was written from."
        )
    if name not in ARCHITECTURES:
        raise NoSuchModelError(
            f"{reference}: is a GGUF file of the architecture {name!r}; of GGUF, moemerge reads "
            f"{', '.join(ARCHITECTURES)}. Name the model that it was written from."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{reference}: two of its GGUF files hold the tensor {twice!r}. Download them again.")
    return found


def _shortest(value: Any) -> Any:
    rounded = np.float32(value) if isinstance(value, float) else None
    return float(str(rounded)) if rounded is not None and float(rounded) == value else value
