"""Make a GGUF file's tensors from a checkpoint's: renamed, stacked, divided, rows of heads in llama.cpp's order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from moemerge.checkpoint.floats import TYPES
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.pieces import Band, Piece, measure
from moemerge.checkpoint.transposed import Transposed
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.export.blocks import BLOCK_ELEMENTS, FLOATS, GgufType, Quantised
from moemerge.export.families import Config, GgufFamily, Names, Part
from moemerge.export.keys import proportional_factors, rope_factors
from moemerge.families.layer_names import layer_prefix

# Weights that engines read in float32 alone, whatever the rest of the file is; so are vectors, and other tensors.
_ALWAYS_F32: Final = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "shortconv.conv.weight")
_STACK_AXES: Final = 3
# Groups of which each layer has one, if the family has them; the first where it seems to have none.
_EITHER: Final = (("routed", "dense"), ("attention", "convolution"))
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# A limit for configs that may say anything; layers beyond it are missing in any case.
_MOST_EXPERTS: Final = 100_000
_HEADS: Final = {"query": "num_attention_heads", "key": "num_key_value_heads"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Shape with the longest stride first, as in a checkpoint: a file lists its axes the other way round."""
    type: GgufType
    bands: tuple[Band, ...]
    """The pieces that its bytes are made of."""

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return measure(self.bands)


@dataclass(frozen=True)
class Conversion:
    """The conversion of a checkpoint into tensors of a GGUF file."""

    family: GgufFamily
    config: Config
    """The checkpoint's `config.json`."""
    type: GgufType
    """The type of matrices."""

    def tensors(self, table: Mapping[str, TensorInfo]) -> list[GgufTensor]:
        """Make every tensor, layer by layer; those that are made of the config alone come first.

        Raises:
            IncompatibleError: a tensor is missing, or would be dropped.
        """
        layers = [(f"blk.{layer}.", layer_prefix(layer)) for layer in range(self.config["num_hidden_layers"])]
        places = [("", "", self.family.whole), *((*place, self.family.layer) for place in layers)]
        found, used, missing = list(self._rope_freqs()), set[str](), list[str]()
        for place, prefix, names in places:
            groups = self._groups(names, prefix, table)
            for name, part in names.items():
                sources = self._sources(prefix + part.source, table)
                absent = [source for source in sources if source not in table]
                used.update(sources)
                stored = [table[source] for source in sources if source in table]
                odd = [tensor for tensor in stored if tensor.dtype not in TYPES]
                if odd:
                    missing.append(f"{odd[0].name} is stored as {odd[0].dtype}, not as floats")
                elif absent and part.needed and part.group in groups:
                    missing.append(f"{absent[0]} is missing")
                elif not absent and stored[0].nbytes:
                    found.append(self._tensor(place + name, part, stored))
        missing += [f"{name} has no place in a GGUF file of its kind" for name in table if name not in used]
        if missing:
            raise IncompatibleError(
                f"The checkpoint is not what llama.cpp's {self.family.architecture} is made of:", missing
            )
        return found

    def _groups(self, names: Names, prefix: str, table: Mapping[str, TensorInfo]) -> set[str]:
        """Find the groups that a layer has; every needed tensor of these groups has to be there."""
        found = {part.group for part in names.values() if self._sources(prefix + part.source, table)[0] in table}
        known = {part.group for part in names.values()}
        lacking = [either[0] for either in _EITHER if known & set(either) and not found & set(either)]
        return {"", *found, *lacking}

    def _rope_freqs(self) -> Iterator[GgufTensor]:
        factors = proportional_factors(self.config) if self.family.is_gemma4 else rope_factors(self.config)
        if factors is not None:
            piece = Piece(factors.astype("<f4").tobytes(), "F32")
            yield GgufTensor("rope_freqs.weight", factors.shape, "f32", ((piece,),))

    def _sources(self, source: str, table: Mapping[str, TensorInfo]) -> list[str]:
        if "{expert}" not in source:
            return [source]
        names = [source.format(expert=expert) for expert in range(self._experts)]
        return names if names[0] in table else names[:1]

    @property
    def _experts(self) -> int:
        found = next((self.config[key] for key in _EXPERTS if self.config.get(key)), None)
        if type(found) is not int:
            raise CheckpointError(f"config.json: names no number of experts, by none of {', '.join(_EXPERTS)}.")
        return min(found, _MOST_EXPERTS)

    def _tensor(self, name: str, part: Part, sources: list[TensorInfo]) -> GgufTensor:
        is_stack = "{expert}" in part.source or part.cut or (part.half and len(sources[0].shape) == _STACK_AXES)
        sources = [half for source in sources for half in _halves(source, part)]
        sources = [head for source in sources for head in self._heads(source, part)]
        if part.squeezed:
            sources = [replace(source, shape=(source.shape[0], *source.shape[2:])) for source in sources]
        shape = (len(sources), *sources[0].shape) if is_stack else sources[0].shape
        kind = type_of(name, shape, self.type)
        head_rows = 0
        if part.turned:
            head_rows = shape[0] // int(self.config[_HEADS[part.turned]])
        pieces = [
            Piece(source, FLOATS.get(kind, "F32"), head_rows=head_rows, into_pairs=bool(head_rows))
            for source in sources
        ]
        bands = tuple((piece,) for piece in pieces)
        if kind == "q8_0":
            bands = ((Piece(Quantised(name, bands).tensor(), "U8"),),)
        return GgufTensor(name, shape, kind, bands)

    def _heads(self, source: TensorInfo, part: Part) -> Iterator[TensorInfo]:
        """Yield the chosen rows of every head; a head has those for keys before those for values."""
        if not part.cut:
            yield source
            return
        keys, values = int(self.config["qk_nope_head_dim"]), int(self.config["v_head_dim"])
        for first in range(0, source.shape[0], keys + values):
            yield (
                Transposed(source.rows(first, keys)).tensor()
                if part.cut == "keys"
                else source.rows(first + keys, values)
            )


def type_of(name: str, shape: tuple[int, ...], asked: GgufType) -> GgufType:
    """Choose the type of a tensor in a file of some type."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(_ALWAYS_F32):  # noqa: PLR2004
        return "f32"
    if asked == "q8_0" and shape[-1] % BLOCK_ELEMENTS:
        return "f16"
    return asked


def _halves(source: TensorInfo, part: Part) -> Iterator[TensorInfo]:
    """Yield the chosen half of a tensor's rows; for a stack, of every expert's."""
    if not part.half:
        yield source
        return
    *stack, rows, width = source.shape
    flat = replace(source, shape=(rows * (stack[0] if stack else 1), width))
    for first in range(0, flat.shape[0], rows):
        yield flat.rows(first + (rows // 2 if part.half == "second" else 0), rows // 2)
