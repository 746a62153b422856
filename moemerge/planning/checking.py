"""The third step of a plan: check that the models' tensors fit, and compare the experts' weights with the base's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.unreadable import Resized
from moemerge.compatibility.checks import Findings, check_adapters, check_base, check_expert
from moemerge.compatibility.differences import Judgement, NamedModel, judge_experts
from moemerge.config.schema import MergeConfig
from moemerge.planning.models import Member, Models, refuse
from moemerge.planning.notes import config_notes, vocabulary_notes
from moemerge.planning.router_sources import base_ffn_layers
from moemerge.planning.shape import Shape, computes_gate
from moemerge.planning.vision import kept_towers, left_out_notes, vision_notes

Tables = Mapping[str, dict[str, TensorInfo]]
"""Tensor tables by model reference."""


@dataclass(frozen=True)
class Checked:
    """Models that can be merged."""

    notes: tuple[str, ...]
    judgement: Judgement
    """Problems, warnings and notes about the experts."""

    @property
    def urgent(self) -> list[str]:
        """Warnings to print before a long download: they come from comparing weights on the Hub."""
        return self.judgement.warnings if self.judgement.compared_bytes else []


def check_models(
    config: MergeConfig, models: Models, shape: Shape, tables: Tables, judgement: Judgement | None = None
) -> Checked:
    """Check every tensor table, then compare a few rows of the experts' weights with the base's.

    Args:
        config: the merge.
        models: the models.
        shape: the merged model's shape.
        tables: the models' tensors.
        judgement: what an earlier comparison of the same models found; None to compare them.

    Raises:
        IncompatibleError: the models cannot be merged; lists every reason.
        CheckpointError: a file cannot be read.
        SourceError: a file on the Hub cannot be reached.
    """
    findings = list(_findings(config, models, shape, tables))
    refuse([problem for finding in findings for problem in finding.problems])
    files, choice = shape.base_files, shape.choice
    notes = [
        *(note for folder in models.by_reference.values() for note in folder.notes),
        *left_out_notes(models.by_reference.values(), kept_towers(models.base.folder) if shape.vision else ()),
        *vision_notes(shape.vision, models.base.folder),
        *models.notes,
        *vocabulary_notes(config, models, shape.lost_tokens),
        *(note for finding in findings for note in finding.notes),
        *files.notes,
        *files.reader_notes,
        *choice.notes,
        *config_notes(config, shape.family, runs_base=shape.runs_base, gated=computes_gate(config, shape.family)),
    ]
    judgement = judgement or judge_experts(
        config,
        shape.mixture,
        _named(models.base),
        [_named(member) for member in models.every_expert],
        tables,
    )
    refuse(judgement.problems)
    return Checked((*notes, *judgement.notes), judgement)


def _findings(config: MergeConfig, models: Models, shape: Shape, tables: Tables) -> Iterator[Findings]:
    """Yield the findings about each tensor table: the base's, every expert's, then those of adapters."""
    base, shared = models.base.model, config.shared_weights.method
    layers = base_ffn_layers(config, shape.mixture, base, runs_base=shape.runs_base)
    yield check_base(base, shape.family, tables[config.base_model], layers)
    for member in models.every_expert:
        table = tables[member.folder.reference]
        if shape.vocabulary:  # which takes rows of embeddings that adapters have resized
            table = {name: tensor for name, tensor in table.items() if not isinstance(tensor.path, Resized)}
        yield check_expert(member.name, member.model, table, shared=shared)
    for member in models.every_expert:
        if member.folder.adapters:
            table = tables[member.folder.reference]
            yield check_adapters(member.name, member.folder, member.model, table, shared=shared)


def _named(member: Member) -> NamedModel:
    return NamedModel(member.name, member.folder, member.model)
