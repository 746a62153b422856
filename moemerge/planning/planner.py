"""Deciding a merge from configs, headers and a few rows."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final, Literal

from moemerge.checkpoint.derived import Derived, leaves
from moemerge.checkpoint.extents import layout_to_share, shared_bytes, shares_extents
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.shards import Shard, TensorSpec, layout_shards
from moemerge.compatibility.checks import Findings, check_adapters, check_base, check_configs, check_expert
from moemerge.compatibility.differences import Speaker, judge_experts
from moemerge.config.schema import MergeConfig
from moemerge.dtypes import CONFIG_DTYPES, HEADER_DTYPES, bytes_of
from moemerge.engines import Engine
from moemerge.errors import IncompatibleError, RefusedError
from moemerge.families.dense import DenseModel, read_dense
from moemerge.families.family import MoeFamily
from moemerge.families.mixture import Mixture
from moemerge.families.selection import select_family
from moemerge.planning.inputs import Parts, take_parts
from moemerge.planning.notes import config_notes, output_notes
from moemerge.planning.output import Output
from moemerge.planning.plan import MergePlan
from moemerge.planning.router_inputs import base_ffn_layers, check_texts, check_widths, router_reads
from moemerge.planning.shape import mixture_of, residual_scales
from moemerge.planning.tensors import Assembly, Source
from moemerge.planning.tokenizer_files import find_base_files
from moemerge.planning.tokenizer_proof import prove_tokenizer
from moemerge.sources.model_folder import ModelFolder, fetch_if_room, open_model, read_tensor_tables

Tensors = Mapping[str, TensorInfo]
DEFAULT_MAX_SHARD_BYTES: Final = 5_000_000_000


def plan_merge(
    config: MergeConfig,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    target: Path | None = None,
    routing_table: bool = False,
    needs_texts: bool = True,
    weights: Literal["auto", "stream"] = "auto",
    approve: Callable[[Sequence[ModelFolder]], None] = lambda _: None,
    announce: Callable[[str], None] = lambda _: None,
    prove: bool = False,
    preferred: Engine | None = None,
) -> MergePlan:
    """Decide a merge from configs, headers and some rows of the FFNs, and for `fold_norms` norms; nothing is written.

    Of Hub models that are not in the cache these are read by ranges; pickles have no headers and are downloaded. When
    everything was found to agree, weights are downloaded, or stay on the Hub to be read by ranges.

    Args:
        config: the merge.
        max_shard_bytes: upper bound of the tensor data in one output file.
        target: the folder that will be written, if known: where its file system can share blocks with the sources',
            shards are laid out for that. This is tried with an unnamed temporary file.
        routing_table: whether to show what the routers do with the prompts, even where that takes a pass of the base
            model which the routers do not need.
        needs_texts: whether files of text have to be there, as for routers.
        weights: of Hub models that are not in the cache: `stream` leaves them on the Hub, to be read by ranges; `auto`
            does so where the disk has no room for them.
        approve: called with the base, every expert and every shared expert, once their configs were found to fit and
            before any weights are downloaded; may raise.
        announce: called with a line about what takes long.
        preferred: an engine that should read the output rightly, if one can; `config.engine` is one that has to.
        prove: whether transformers proves the output's tokenizer before any weights are downloaded. Else `merge` does.

    Raises:
        SourceError: a model cannot be reached.
        CheckpointError: a model's files are damaged.
        IncompatibleError: the models cannot be merged; lists every reason.
        ConfigError: the config was changed by `model_copy` into one that is wrong.
        RefusedError: texts are missing, `max_shard_bytes` is below 1, or the output's tokenizer would give other ids.
    """
    # What is planned stays, whatever becomes of the one that is given.
    config = config.rechecked().model_copy(deep=True)
    if max_shard_bytes < 1:
        raise RefusedError(
            f"max_shard_bytes: a shard of at most {max_shard_bytes} bytes holds nothing. Choose 1 or more."
        )
    runs_base = config.needs_pass or (routing_table and config.has_descriptions)
    every_expert = [*config.experts, *config.shared_experts]
    references = dict.fromkeys([config.base_model, *(expert.source_model for expert in every_expert)])
    opened = {reference: open_model(reference, announce) for reference in references}
    base_folder = opened[config.base_model]
    folders = [opened[expert.source_model] for expert in every_expert]
    routed = len(config.experts)
    places = _places(config)
    names = [f"{place} {folder.reference}" for place, folder in zip(places, folders, strict=True)]
    found = check_configs(base_folder.config, [(n, f.config) for n, f in zip(names, folders, strict=True)])
    _refuse(found.problems)
    base, models = _dense(base_folder), [_dense(folder) for folder in folders]
    files = find_base_files(base_folder, announce, needed=runs_base or config.reads_text)
    if needs_texts and (runs_base or config.reads_text):
        check_texts(config)
    _refuse(check_widths(config, base, models[:routed]))
    mixture = mixture_of(config, base, models[:routed], models[routed:])
    family = (choice := select_family(base, mixture, config.architecture, config.engine, preferred)).family
    _refuse(_check_noise(config, family))
    # The output's dtype may be known only later, and does not matter here.
    tokenizer = (
        prove_tokenizer(files, family.config(base, mixture, "bfloat16"), in_process=runs_base) if prove else None
    )
    approve((base_folder, *folders))
    tables = dict(zip(opened, read_tensor_tables(opened.values(), announce, weights="stream", dense=True), strict=True))
    dtype = config.dtype or _main_dtype(tables[config.base_model])
    named = list(zip(names, folders, models, strict=True))
    findings = [
        found,
        check_base(
            base, family, tables[config.base_model], base_ffn_layers(config, mixture, base, runs_base=runs_base)
        ),
        *_check_experts(config, tables, named),
    ]
    _refuse([problem for finding in findings for problem in finding.problems])
    notes = [
        *(note for folder in opened.values() for note in folder.notes),
        *(note for finding in findings for note in finding.notes),
        *files.notes,
        *files.reader_notes,
        *choice.notes,
        *config_notes(config, family, runs_base=runs_base, gated=_computes_gate(config, family)),
    ]
    judged = judge_experts(
        config, mixture, (Speaker("base_model", base_folder, base), tables[config.base_model]),
        [(Speaker(*expert), tables[expert[1].reference]) for expert in named],
    )  # fmt: skip
    _refuse(judged.problems)
    notes += judged.notes
    take = partial(take_parts, config, mixture, base, [*zip(places, models, strict=True)], dtype=HEADER_DTYPES[dtype])
    parts = take(tables=tables)
    notes += parts.notes
    assemble = partial(_assembly, config, family, mixture, base=base, models=models, dtype=HEADER_DTYPES[dtype])
    outputs = assemble(parts=parts).outputs()
    if weights == "auto":
        for warning in judged.warnings if judged.compared_bytes else ():  # before gigabytes are waited for
            announce(f"warning: {warning}")
        output_bytes = sum(bytes_of(HEADER_DTYPES[dtype], output.shape) or 0 for output in outputs.values())
        if fetched := fetch_if_room(opened, tables, beside=(target, output_bytes), announce=announce):
            tables |= fetched
            parts = take(tables=tables)
            outputs = assemble(parts=parts).outputs()
    shards, shared = _layout(outputs, HEADER_DTYPES[dtype], max_shard_bytes, target)
    notes += output_notes(outputs, dtype, shared)
    experts = tuple(zip(models[:routed], parts.experts[:routed], strict=True))
    total, active = _count_parameters(outputs, config)
    return MergePlan(
        config=config,
        family=family,
        mixture=mixture,
        base=base,
        base_folder=base_folder.folder,
        base_tensors=dict(parts.base),
        experts=experts,
        sources=(base_folder, *folders),
        reread=(
            *router_reads(config, mixture, base, parts.base, experts, runs_base=runs_base),
            *(tensor for tensor in parts.base.values() if isinstance(tensor.path, Derived) and tensor.path.rereads),
            *_repeated(outputs),
        ),
        stamps={path: stamp for folder in opened.values() for path, stamp in folder.stamps.items()},
        references={
            leaf.path: opened[name].name_of(leaf.path)
            for name, table in tables.items()
            for tensor in table.values()
            for leaf in leaves(tensor)
        },
        dtype=dtype,
        output_config=family.config(base, mixture, dtype),
        outputs=outputs,
        shards=tuple(shards),
        base_files=files,
        tokenizer=tokenizer,
        notes=tuple(notes),
        warnings=(*choice.warnings, *judged.warnings),
        advice=() if judged.has_strangers else tuple(parts.advice),
        compared_bytes=judged.compared_bytes,
        family_notes=(*files.reader_notes, *choice.notes),
        right_in=choice.right_in,
        shared_bytes=shared,
        runs_base=runs_base,
        total_parameters=total,
        active_parameters=active,
    )


def _places(config: MergeConfig) -> list[str]:
    """Every expert, then every shared expert, as messages call it."""
    parts = (("experts", config.experts), ("shared_experts", config.shared_experts))
    return [f"{key}[{number}]" for key, experts in parts for number in range(len(experts))]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise IncompatibleError("These models cannot be merged:", problems)


def _check_experts(
    config: MergeConfig, tables: Mapping[str, Tensors], named: Sequence[tuple[str, ModelFolder, DenseModel]]
) -> Iterator[Findings]:
    shared = config.shared_weights.method
    for name, folder, model in named:
        yield check_expert(name, model, tables[folder.reference], shared=shared)
    for name, folder, model in named:
        if folder.adapters:
            yield check_adapters(name, folder, model, tables[folder.reference], shared=shared)


def _check_noise(config: MergeConfig, family: MoeFamily) -> list[str]:
    if family.shared or not any(expert.noise_scale for expert in config.shared_experts):
        return []
    return [f"shared_experts[].noise_scale: {family.model_type} has copies of them, each would get other noise"]


def _dense(folder: ModelFolder) -> DenseModel:
    model = read_dense(folder.config)
    if isinstance(model, str):
        raise IncompatibleError("These models cannot be merged:", [f"{folder.reference}: {model}"])
    return model


def _main_dtype(tensors: dict[str, TensorInfo]) -> str:
    """The dtype that most of a model's bytes are stored in; `config.json` may claim another."""
    counted: Counter[str] = Counter()
    for leaf in chain.from_iterable(map(leaves, tensors.values())):
        if leaf.dtype in CONFIG_DTYPES:
            counted[leaf.dtype] += leaf.nbytes
    return CONFIG_DTYPES[counted.most_common(1)[0][0]] if counted else "bfloat16"


def _computes_gate(config: MergeConfig, family: MoeFamily) -> bool:
    return bool(family.shared and family.shared.gate) and config.computes_shared_gate


def _assembly(
    config: MergeConfig, family: MoeFamily, mixture: Mixture, *, base: DenseModel, models: Sequence[DenseModel],
    parts: Parts, dtype: str,
) -> Assembly:  # fmt: skip
    computes_gate = _computes_gate(config, family)
    scales, shared_scales = residual_scales(config, gated=computes_gate)
    # A gate of 0 is a weight of one half.
    halved = family.shared is not None and bool(family.shared.gate) and not computes_gate
    scales += [scale * (2 if halved else 1) for scale in shared_scales]
    every_expert = [*config.experts, *config.shared_experts]
    sources = [
        Source(model, tensors, scale, expert.noise_scale or 0.0)
        for expert, model, tensors, scale in zip(every_expert, models, parts.experts, scales, strict=True)
    ]
    routed = len(config.experts)
    return Assembly(
        family=family,
        mixture=mixture,
        base=Source(base, parts.base),
        experts=sources[:routed],
        shared=sources[routed:],
        computes_gate=computes_gate,
        dtype=dtype,
    )


def _layout(
    outputs: dict[str, Output], dtype: str, max_shard_bytes: int, target: Path | None
) -> tuple[list[Shard], int]:
    """The shards, and how many of their bytes are shared with the sources."""
    specs = [TensorSpec(n, dtype, o.shape, bytes_of(dtype, o.shape) or 0) for n, o in outputs.items()]
    copied = {name: source for name, output in outputs.items() if (source := output.copied_from)}
    paths = {tensor.path for tensor in copied.values()}
    if not (target and paths and all(isinstance(path, Path) and shares_extents(path, target) for path in paths)):
        return layout_shards(specs, max_shard_bytes), 0
    starts = {name: tensor.start for name, tensor in copied.items()}
    shards = layout_to_share(specs, starts, max_shard_bytes)
    return shards, shared_bytes(specs, starts, shards)


def _repeated(outputs: Mapping[str, Output]) -> Iterator[TensorInfo]:
    """What several tensors of the output are made of."""
    pieces = (piece.source for output in outputs.values() for piece in output.pieces)
    counted = Counter(leaf for source in pieces if isinstance(source, TensorInfo) for leaf in leaves(source))
    yield from (tensor for tensor, count in counted.items() if count > 1)


def _count_parameters(outputs: dict[str, Output], config: MergeConfig) -> tuple[int, int]:
    """All parameters, and those that one token passes through."""
    total = sum(math.prod(output.shape) for output in outputs.values())
    in_experts = sum(math.prod(output.shape) for output in outputs.values() if output.is_expert)
    return total, total - in_experts * (len(config.experts) - config.experts_per_token) // len(config.experts)
