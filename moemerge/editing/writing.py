"""Carry out an edit: the edited mixture in a folder of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path

from moemerge.checkpoint.pieces import Band
from moemerge.config.config_copy import text_for
from moemerge.config.schema import CONFIG_COPY
from moemerge.editing.plan import EditPlan
from moemerge.editing.planned_model import write_card_of, writing_model
from moemerge.model_card.edit_card import EditCard
from moemerge.planning.output import Computed
from moemerge.progress import Progress


def write_edit(
    plan: EditPlan,
    out: Path,
    routers: Callable[[], Mapping[str, tuple[Band, ...]]],
    *,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress = lambda _task, _done, _total: None,
) -> None:
    """Write the edited mixture; the folder is complete when this returns, and untouched when it raises.

    Args:
        plan: the plan, from `plan_edit`.
        out: the folder.
        routers: called while bytes are copied for the routers that are computed, by name.
        overwrite: whether to replace a model that is there.
        seed: the seed of `noise_scale`.
        progress: called as the work goes on.

    Raises:
        RefusedError: something would be lost.
        OutputError: the disk is full or cannot be written.
        CheckpointError: a source is not what its header said.
    """
    with writing_model(plan, out, progress, overwrite=overwrite, seed=seed) as (stage, writer):
        writer.add({name: o.origin for name, o in plan.outputs.items() if not isinstance(o.origin, Computed)})
        if plan.computed:
            writer.add(routers())
        text = text_for(plan.config, out)
        (stage / CONFIG_COPY).write_text(text, encoding="utf-8")
        write_card(plan, stage, out, text)


def write_card(plan: EditPlan, folder: Path, final: Path, text: str) -> None:
    """Write the model card into a folder that will be called `final`; `text` is the config that it shows."""
    write_card_of(plan, _card(plan, text), folder, final)


def _card(plan: EditPlan, text: str) -> EditCard:
    mixture = plan.mixture
    left_out = f" Left out: {', '.join(plan.dropped)}." if plan.dropped else ""
    return EditCard(
        model_type=mixture.family.model_type,
        what=f"A {mixture.family.model_type} of {plan.experts} experts, {plan.experts_per_token} per token: "
        f"{plan.folder.reference} with {mixture.experts} experts, {mixture.experts_per_token} per token, edited with "
        f"moemerge.{left_out}",
        parameters=(plan.total_parameters, plan.active_parameters),
        rows=plan.origins_of_experts,
        notes=plan.notes,
        text=text.rstrip(),
    )
