"""The fourth step of a plan: decide every output tensor from the models' tensor tables."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from moemerge.checkpoint.derived import plain_leaves
from moemerge.checkpoint.header import TensorInfo
from moemerge.config.schema import MergeConfig
from moemerge.dtypes import CONFIG_DTYPES, HEADER_DTYPES, DType, HeaderDType, bytes_of
from moemerge.planning.assembly import Assembly, Source
from moemerge.planning.checking import Tables
from moemerge.planning.models import Models
from moemerge.planning.output import Output
from moemerge.planning.parts import Parts, take_parts
from moemerge.planning.reinitialising import reinitialising_of
from moemerge.planning.shape import Shape, computes_gate, residual_scales
from moemerge.planning.vision import beside_towers
from moemerge.planning.vocabulary_rows import unmixed_rows, with_unmixed_rows, with_vocabulary


@dataclass(frozen=True)
class Assembled:
    """The output tensors of a merge, and what they are made of."""

    dtype: DType
    """Dtype of every tensor, as `config.json` spells it."""
    parts: Parts
    """The tensors that the base and each expert contribute."""
    outputs: Mapping[str, Output]
    """All tensors of the merged model by name, in the order of the layers; routers last."""
    tables: Tables
    """Tensor tables of the models' files, by reference."""

    @property
    def nbytes(self) -> int:
        """Total size of all tensors in bytes, without headers."""
        dtype = HEADER_DTYPES[self.dtype]
        return sum(bytes_of(dtype, output.shape) or 0 for output in self.outputs.values())


def assemble(config: MergeConfig, models: Models, shape: Shape, tables: Tables) -> Assembled:
    """Decide what each tensor of the merged model is made of; with `fold_norms` this reads the norms.

    Raises:
        IncompatibleError: the config cannot be followed exactly with these models.
        CheckpointError: a norm that is to be folded is damaged.
    """
    gguf = models.base.folder.gguf
    dtype = config.dtype or (gguf and gguf.usual_dtype) or _main_dtype(tables[config.base_model])
    named = [(member.name, member.model) for member in models.every_expert]
    parts = take_parts(config, shape.mixture, models.base.model, named, tables=tables, dtype=HEADER_DTYPES[dtype])
    parts = with_unmixed_rows(parts, unmixed_rows(config, models), tables[config.base_model])
    parts = with_vocabulary(parts, shape.vocabulary, models)
    outputs = _assembly(config, shape, parts, HEADER_DTYPES[dtype]).outputs()
    if shape.vision:
        outputs = beside_towers(shape.vision, outputs, models.base.folder, HEADER_DTYPES[dtype])
    return Assembled(dtype, parts, outputs, tables)


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> DType:
    """Find the dtype in which most of a model's bytes are stored, or dequantised; `config.json` may name another."""
    counted: Counter[HeaderDType] = Counter()
    for leaf in chain.from_iterable(map(plain_leaves, tensors.values())):
        if leaf.dtype in CONFIG_DTYPES:
            counted[leaf.dtype] += leaf.nbytes
    return CONFIG_DTYPES[counted.most_common(1)[0][0]] if counted else "bfloat16"


def _assembly(config: MergeConfig, shape: Shape, parts: Parts, dtype: HeaderDType) -> Assembly:
    family, gated = shape.family, computes_gate(config, shape.family)
    scales, shared_scales = residual_scales(config, gated=gated)
    # A gate of zeros gives the shared expert a weight of one half.
    halved = family.shared is not None and bool(family.shared.gate) and not gated
    scales += [scale * (2 if halved else 1) for scale in shared_scales]
    every_expert = [*config.experts, *config.shared_experts]
    sources = [
        Source(own, scale, expert.noise_scale or 0.0, reinitialising_of(expert, number))
        for number, (expert, own, scale) in enumerate(zip(every_expert, parts.experts, scales, strict=True))
    ]
    routed = len(config.experts)
    return Assembly(
        family=family,
        mixture=shape.mixture,
        base=Source(parts.base),
        experts=sources[:routed],
        shared=sources[routed:],
        computes_gate=gated,
        dtype=dtype,
    )
