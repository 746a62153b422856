"""Plan a merge: from configs, headers and a few rows to every byte of the output."""

from collections.abc import Callable, Sequence
from types import MappingProxyType

from moemerge.config.schema import MergeConfig
from moemerge.planning.assembled import Assembled, assemble
from moemerge.planning.checking import Checked, Tables, check_models
from moemerge.planning.layout import Layout, lay_out
from moemerge.planning.models import Models, open_models, read_tables
from moemerge.planning.notes import norm_notes, output_notes, router_advice, vocabulary_advice, writing_note
from moemerge.planning.options import PlanOptions
from moemerge.planning.origins import origins_of
from moemerge.planning.plan import MergePlan, Remarks
from moemerge.planning.quantised_notes import quantised_notes
from moemerge.planning.shape import Shape, shape_of
from moemerge.planning.shared_choice import BASE, postpone, with_method
from moemerge.sources.cache_room import fetch_if_room
from moemerge.sources.model_folder import ModelFolder


def plan_merge(
    config: MergeConfig,
    options: PlanOptions = PlanOptions(),
    *,
    approve: Callable[[Sequence[ModelFolder]], None] = lambda _: None,
    announce: Callable[[str], None] = lambda _: None,
) -> MergePlan:
    """Decide a merge from configs, headers, some rows of the FFNs and, for `fold_norms`, the norms; nothing is written.

    For Hub models that are not in the cache these are read by byte ranges; pickles have no headers and are downloaded.
    Once everything fits, weights are downloaded, or stay on the Hub to be read by ranges.

    Args:
        config: the merge.
        options: options beside the config.
        approve: called with the base, every expert and every shared expert, once their configs were found to fit and
            before any weights are downloaded; may raise.
        announce: called with a line about each step that takes long.

    Raises:
        SourceError: a model cannot be reached.
        CheckpointError: a model's files are damaged.
        IncompatibleError: the models cannot be merged; lists every reason.
        ConfigError: the config was changed by `model_copy` into one that is wrong.
        RefusedError: texts are missing, or the output's tokenizer would give other ids.
    """
    # A copy, so that later changes to the given config do not reach the plan.
    given = config.rechecked().model_copy(deep=True)
    config = with_method(given, BASE) if given.shared_weights.is_open else given
    models = open_models(config, announce)
    shape = shape_of(given, models, options, announce)
    approve(models.sources)
    tables = read_tables(config, models, announce)
    checked = check_models(config, models, shape, tables)
    assembled = assemble(config, models, shape, tables)
    if options.weights == "auto" and (fetched := _fetch(models, checked, assembled, options, announce)):
        tables |= fetched
        assembled = assemble(config, models, shape, tables)

    def remake(changed: MergeConfig) -> MergePlan:
        again = check_models(changed, models, shape, tables, checked.judgement)
        return _plan(changed, models, shape, again, assemble(changed, models, shape, tables), options, remake)

    plan = _plan(config, models, shape, checked, assembled, options, remake)
    return (
        plan
        if given is config
        else postpone(plan, given, strangers=checked.judgement.has_strangers, needs_texts=options.needs_texts)
    )


def _plan(  # noqa: PLR0917  the results of all steps
    config: MergeConfig,
    models: Models,
    shape: Shape,
    checked: Checked,
    assembled: Assembled,
    options: PlanOptions,
    remake: Callable[[MergeConfig], MergePlan],
) -> MergePlan:
    """Lay the output out, and put everything together that was decided."""
    layout = lay_out(assembled, options)
    return MergePlan(
        config=config,
        models=models,
        shape=shape,
        parts=assembled.parts,
        dtype=assembled.dtype,
        outputs=MappingProxyType(assembled.outputs),
        layout=layout,
        origins=origins_of(config, models, shape, assembled),
        remarks=_remarks(config, shape, checked, assembled, layout),
        compared_bytes=checked.judgement.compared_bytes,
        to_store=options.to_store,
        remake=remake,
    )


def _fetch(
    models: Models, checked: Checked, assembled: Assembled, options: PlanOptions, announce: Callable[[str], None]
) -> Tables:
    """Download weights where the disk has room for them; return their tensor tables."""
    for warning in checked.urgent:
        announce(f"warning: {warning}")
    beside = (options.target, assembled.nbytes)
    return fetch_if_room(models.by_reference, assembled.tables, beside=beside, announce=announce)


def _remarks(config: MergeConfig, shape: Shape, checked: Checked, assembled: Assembled, layout: Layout) -> Remarks:
    parts, judgement = assembled.parts, checked.judgement
    output_facts = output_notes(assembled.outputs, assembled.dtype, layout.shared_bytes)
    quantised = tuple(quantised_notes(config, assembled.tables))
    norms = norm_notes(parts.base.model.family, shape.family, assembled.dtype)
    return Remarks(
        quantised=quantised,
        notes=(*checked.notes, *quantised, *parts.notes, *output_facts, *norms, *writing_note(config, parts.experts)),
        warnings=(*shape.choice.warnings, *judgement.warnings),
        advice=(
            *(() if judgement.has_strangers else parts.advice),
            *([] if judgement.has_strangers else vocabulary_advice(shape.lost_tokens)),
            *router_advice(config),
        ),
    )
