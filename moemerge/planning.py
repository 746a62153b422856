"""Deciding a merge from configs and headers alone."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from moemerge.checkpoint.extents import layout_to_share, shared_bytes, shares_extents
from moemerge.checkpoint.header import StoredTensor
from moemerge.checkpoint.pieces import Piece
from moemerge.checkpoint.shards import Shard, TensorSpec, layout_shards
from moemerge.compatibility import check_base, check_configs, check_expert
from moemerge.config import Expert, MergeConfig
from moemerge.dtypes import NAMED, STORED, bytes_of
from moemerge.errors import IncompatibleError
from moemerge.formats import select_family
from moemerge.formats.dense import DenseModel, read_dense
from moemerge.formats.family import MoeFamily
from moemerge.plan import MergePlan, Output
from moemerge.sources import ModelFolder, open_model, read_tensor_table

DEFAULT_MAX_SHARD_BYTES: Final = 5_000_000_000
# Beside the weights, copied from the base byte for byte.
COPIED_FILES: Final = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def plan_merge(
    config: MergeConfig,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    target: Path | None = None,
    routing_table: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> MergePlan:
    """Decide a merge from configs and headers; no tensor bytes are read and nothing is written.

    Weights of Hub models that are not in the cache are downloaded, after the models' configs were found to agree.

    Args:
        config: the merge.
        max_shard_bytes: upper bound of the tensor data in one output file.
        target: the folder that will be written, if known: where its file system can share blocks with the sources',
            shards are laid out for that. This is tried with an unnamed temporary file.
        routing_table: whether to show what the routers do with the prompts, even where that takes a pass of the base
            model which the routers do not need.
        announce: called with a line about what takes long.

    Raises:
        SourceError: a model cannot be reached.
        CheckpointError: a model's files are damaged.
        IncompatibleError: the models cannot be merged; lists every reason.
    """
    runs_base = config.needs_pass or (routing_table and config.has_prompts)
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
    if dtype == "float16" and any(piece.changes_values for output in outputs.values() for piece in output.pieces):
        notes.append(
            "float16 cannot express weights above 65504: the merge stops if it meets one; bfloat16 holds them all"
        )
    specs = [_spec(name, STORED[dtype], output.shape) for name, output in outputs.items()]
    shards, shared = _layout(outputs, specs, max_shard_bytes, target)
    if shared:
        notes.append(
            f"{shared / 1e9:.2f} GB of the output share their place on the disk with the models they come from"
        )
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
        shards=tuple(shards),
        copied_files=copied_files,
        notes=tuple(notes),
        shared_bytes=shared,
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
        return Output(base_tensors[name].shape, ((Piece(base_tensors[name], dtype),),))

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
                outputs[template.format(layer=layer, expert=number)] = Output(source.shape, ((piece,),), number)
    outputs[last] = shared(last)
    if base.family.head in base_tensors:
        outputs[base.family.head] = shared(base.family.head)
    # Routers come last: every other shard is complete without them.
    for layer in range(base.layers):
        outputs[family.router.format(layer=layer)] = Output((len(experts), base.config["hidden_size"]), layer)
    return outputs


def _layout(
    outputs: dict[str, Output], specs: list[TensorSpec], max_shard_bytes: int, target: Path | None
) -> tuple[list[Shard], int]:
    """The shards, and how many of their bytes are shared with the sources."""
    copied = {name: source for name, output in outputs.items() if (source := output.copied_from)}
    paths = {tensor.path for tensor in copied.values()}
    if target is None or not paths or not all(shares_extents(path, target) for path in paths):
        return layout_shards(specs, max_shard_bytes), 0
    starts = {name: tensor.start for name, tensor in copied.items()}
    shards = layout_to_share(specs, starts, max_shard_bytes)
    return shards, shared_bytes(specs, starts, shards)


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, dtype, shape, bytes_of(dtype, shape) or 0)


def _count_parameters(outputs: dict[str, Output], config: MergeConfig) -> tuple[int, int]:
    """All parameters, and those that one token passes through."""
    total = sum(math.prod(output.shape) for output in outputs.values())
    in_experts = sum(math.prod(output.shape) for output in outputs.values() if output.expert is not None)
    return total, total - in_experts * (len(config.experts) - config.experts_per_token) // len(config.experts)
