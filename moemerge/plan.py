"""The merge plan: every output tensor, where its bytes come from and where they go. Decided from headers alone."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.index import build_index
from moemerge.checkpoint.jobs import MAX_THREADS
from moemerge.checkpoint.shards import Shard, TensorSpec, layout_shards
from moemerge.checkpoint.writer import Piece
from moemerge.compatibility import check_base, check_configs, check_expert
from moemerge.config import Expert, MergeConfig
from moemerge.dtypes import NAMED, STORED, bytes_of
from moemerge.errors import IncompatibleError
from moemerge.formats import select_family
from moemerge.formats.dense import DenseModel, read_dense
from moemerge.formats.family import MoeFamily
from moemerge.sources import ModelFolder, open_model, read_tensor_table

DEFAULT_MAX_SHARD_BYTES: Final = 5_000_000_000
# Beside the weights, copied from the base byte for byte.
COPIED_FILES: Final = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Resident memory beside the data, measured on Linux with torch 2.13 and transformers 5.23: the program, what
# transformers and some prompts add for the pass over them, and the chunks of one casting thread.
_PROGRAM_BYTES: Final = 330_000_000
_TRANSFORMERS_BYTES: Final = 350_000_000
_CAST_BYTES_PER_THREAD: Final = 64_000_000


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model: a shared or expert tensor with its source, or the router of a layer."""

    shape: tuple[int, ...]
    origin: Piece | int
    """Where the bytes come from; of a router, which is computed later, the layer."""
    expert: int | None = None
    """The expert whose FFN it is part of."""

    @property
    def is_converted(self) -> bool:
        """Whether its bytes are computed from its source's, not copied."""
        return isinstance(self.origin, Piece) and not self.origin.is_unchanged


@dataclass(frozen=True)
class MergePlan:
    """A merge, completely decided; nothing has been written yet."""

    config: MergeConfig
    family: MoeFamily
    base: DenseModel
    base_folder: Path
    base_tensors: dict[str, StoredTensor]
    sources: tuple[ModelFolder, ...]
    """The base, then every expert."""
    dtype: str
    output_config: dict[str, Any]
    """The merged model's `config.json`."""
    outputs: dict[str, Output]
    """Every tensor of the merged model, by name, in the order of the layers; routers last."""
    shards: tuple[Shard, ...]
    copied_files: tuple[Path, ...]
    """Of the base model, beside its weights."""
    notes: tuple[str, ...]
    runs_base: bool
    """Whether the prompts pass through the base model: for the routers, or for the routing table."""
    total_parameters: int
    active_parameters: int
    """Parameters that a token passes through."""

    @property
    def weight_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers: what a merge moves."""
        return sum(shard.nbytes - len(shard.header) for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        """Disk space of the merged model."""
        return self.weight_bytes + sum(path.stat().st_size for path in self.copied_files)

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the resident memory: the program, chunks being cast, one layer for the pass over the prompts."""
        layer = sum(
            4 * math.prod(tensor.shape)
            for name, tensor in self.base_tensors.items()
            if name.startswith("model.layers.0.")
        )
        casts = any(output.is_converted for output in self.outputs.values())
        return (
            _PROGRAM_BYTES
            + MAX_THREADS * _CAST_BYTES_PER_THREAD * casts
            + (_TRANSFORMERS_BYTES + 2 * layer) * self.runs_base
        )

    def fingerprint(self, seed: int) -> dict[str, Any]:
        """What decides every byte of the shards; a merge may be resumed only where all of it is the same."""
        used: dict[Path, list[StoredTensor]] = {}
        for output in self.outputs.values():
            if isinstance(output.origin, Piece) and isinstance(output.origin.source, StoredTensor):
                used.setdefault(output.origin.source.path, []).append(output.origin.source)
        return {
            "moemerge": version("moemerge"),
            "config": self.config.model_dump(mode="json"),
            "seed": seed,
            "shards": {shard.name: hashlib.sha256(shard.header).hexdigest() for shard in self.shards},
            "sources": {
                str(path): {
                    "size": path.stat().st_size,
                    "modified": path.stat().st_mtime_ns,
                    "tensors": hashlib.sha256(repr(sorted(map(repr, tensors))).encode()).hexdigest(),
                }
                for path, tensors in used.items()
            },
        }

    @property
    def index(self) -> str | None:
        """The text of the index, or None where one file holds everything."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: shard.name for shard in self.shards for name in shard.starts}
        return build_index(weight_map, self.tensor_bytes)


def plan_merge(
    config: MergeConfig,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    routing_table: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> MergePlan:
    """Decide a merge from configs and headers; no tensor bytes are read and nothing is written.

    Weights of Hub models that are not in the cache are downloaded, after the models' configs were found to agree.

    Args:
        config: the merge.
        max_shard_bytes: upper bound of the tensor data in one output file.
        routing_table: whether to show what the routers do with the prompts, even where that takes a pass of the base
            model which the routers do not need.
        announce: called with a line about what takes long.

    Raises:
        SourceError: a model cannot be reached.
        CheckpointError: a model's files are damaged.
        IncompatibleError: the models cannot be merged; lists every reason.
    """
    runs_base = config.runs_base or (routing_table and config.has_prompts)
    if config.experts_per_token > len(config.experts):
        raise IncompatibleError(f"{config.experts_per_token} experts per token, but only {len(config.experts)}.", [])
    opened: dict[str, ModelFolder] = {}
    for reference in (config.base_model, *(expert.source_model for expert in config.experts)):
        if reference not in opened:
            opened[reference] = open_model(reference, announce)
    base_folder = opened[config.base_model]
    folders = [opened[expert.source_model] for expert in config.experts]
    names = [f"experts[{number}] {folder.reference}" for number, folder in enumerate(folders)]
    found = check_configs(base_folder.config, [(n, f.config) for n, f in zip(names, folders, strict=True)])
    _refuse(found.problems)
    base = _dense(base_folder)
    copied_files = tuple(path for name in COPIED_FILES if (path := base_folder.file(name)))
    tokenizer_notes = _check_tokenizer({path.name for path in copied_files}, needed=runs_base or config.reads_prompts)
    family = select_family(base, config.architecture, shared_experts=bool(config.shared_experts))

    tables = {reference: read_tensor_table(folder, announce) for reference, folder in opened.items()}
    base_tensors = tables[config.base_model]
    dtype = config.dtype or _main_dtype(base_tensors)
    findings = [found, check_base(base, family, base_tensors)]
    findings += [
        check_expert(name, _dense(folder), tables[folder.reference], base)
        for name, folder in zip(names, folders, strict=True)
    ]
    _refuse([problem for finding in findings for problem in finding.problems])
    notes = [note for finding in findings for note in finding.notes] + tokenizer_notes

    experts = [(expert, tables[expert.source_model]) for expert in config.experts]
    if config.has_prompts and not runs_base:
        notes.append(
            f"the base model does not read the prompts for gate_mode {config.gate_mode}, so an expert that is never "
            "chosen goes unnoticed; --routing-table has it read them"
        )
    outputs = _outputs(base, family, base_tensors, experts, STORED[dtype])
    if dtype == "float16" and any(output.is_converted for output in outputs.values()):
        notes.append(
            "float16 cannot express weights above 65504: the merge stops if it meets one; bfloat16 holds them all"
        )
    specs = [_spec(name, STORED[dtype], output.shape) for name, output in outputs.items()]
    total, active = _count_parameters(outputs, config)
    return MergePlan(
        config=config,
        family=family,
        base=base,
        base_folder=base_folder.folder,
        base_tensors=base_tensors,
        sources=(base_folder, *folders),
        dtype=dtype,
        output_config=family.config(base, len(config.experts), config.experts_per_token, dtype),
        outputs=outputs,
        shards=tuple(layout_shards(specs, max_shard_bytes)),
        copied_files=copied_files,
        notes=tuple(notes),
        runs_base=runs_base,
        total_parameters=total,
        active_parameters=active,
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise IncompatibleError("These models cannot be merged:", problems)


def _dense(folder: ModelFolder) -> DenseModel:
    model = read_dense(folder.config)
    if isinstance(model, str):
        raise IncompatibleError("These models cannot be merged:", [f"{folder.reference}: {model}"])
    return model


def _check_tokenizer(names: set[str], *, needed: bool) -> list[str]:
    """Notes on the base's tokenizer; without one, prompts are refused before any weights are downloaded."""
    if names & {"tokenizer.json", "vocab.json", "tekken.json"}:
        return []
    if "tokenizer.model" in names:
        return [
            "base_model: has tokenizer.model but no tokenizer.json; transformers 5 then chooses the tokenizer's class "
            "by model_type, and may split text differently after the merge. Save it as tokenizer.json first"
        ]
    if needed:
        raise IncompatibleError(
            "base_model: has no tokenizer to read the prompts with.",
            ["add its tokenizer.json, or remove the prompts and choose gate_mode random"],
        )
    return ["base_model: has no tokenizer.json and no tokenizer.model to copy"]


def _main_dtype(tensors: dict[str, StoredTensor]) -> str:
    """The dtype that most of a model's bytes are stored in; `config.json` may claim another."""
    counted: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in NAMED:
            counted[tensor.dtype] += tensor.nbytes
    return NAMED[counted.most_common(1)[0][0]] if counted else "bfloat16"


def _outputs(
    base: DenseModel,
    family: MoeFamily,
    base_tensors: dict[str, StoredTensor],
    experts: list[tuple[Expert, dict[str, StoredTensor]]],
    dtype: str,
) -> dict[str, Output]:
    def shared(name: str) -> Output:
        return Output(base_tensors[name].shape, Piece(base_tensors[name], dtype))

    outputs = {}
    *first, last = base.family.outside  # embeddings lead, the final norm follows the layers
    for name in first:
        outputs[name] = shared(name)
    for layer in range(base.layers):
        for template in base.family.shared:
            outputs[template.format(layer=layer)] = shared(template.format(layer=layer))
        for number, (expert, tensors) in enumerate(experts):
            for role, template in family.experts.items():
                source = tensors[base.family.ffn[role][0].format(layer=layer)]
                scale = expert.residual_scale if role == "down" and expert.residual_scale is not None else 1.0
                piece = Piece(source, dtype, scale, expert.noise_scale or 0.0)
                outputs[template.format(layer=layer, expert=number)] = Output(source.shape, piece, number)
    outputs[last] = shared(last)
    if base.family.head in base_tensors:
        outputs[base.family.head] = shared(base.family.head)
    # Routers come last: every other shard is complete without them.
    for layer in range(base.layers):
        outputs[family.router.format(layer=layer)] = Output((len(experts), base.config["hidden_size"]), layer)
    return outputs


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, dtype, shape, bytes_of(dtype, shape) or 0)


def _count_parameters(outputs: dict[str, Output], config: MergeConfig) -> tuple[int, int]:
    """All parameters, and those that one token passes through."""
    total = sum(math.prod(output.shape) for output in outputs.values())
    in_experts = sum(math.prod(output.shape) for output in outputs.values() if output.expert is not None)
    return total, total - in_experts * (len(config.experts) - config.experts_per_token) // len(config.experts)
