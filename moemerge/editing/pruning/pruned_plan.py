"""The plan of a pruned mixture."""

from collections.abc import Callable
from typing import Any

from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.config.yaml_text import write_yaml
from moemerge.editing.changes import Changes, edit_document
from moemerge.editing.plan import EditPlan
from moemerge.editing.planner import plan_edit
from moemerge.editing.pruning.choice import Pruning
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.options import PlanOptions
from moemerge.sources.model_folder import ModelFolder


def plan_pruning(
    opened: tuple[ModelFolder, StoredMixture],
    pruning: Pruning,
    config: MergeConfig | None,
    options: PlanOptions,
    *,
    new_routers: bool,
    announce: Callable[[str], None] = lambda _: None,
) -> EditPlan:
    """Plan the pruned mixture.

    Args:
        opened: the folder of the whole mixture, and what was read of it.
        pruning: what is kept.
        config: the config that the mixture was made from, if it is known.
        options: the size of shards.
        new_routers: whether router rows change.
        announce: called with a line about each step that takes long.

    Raises:
        IncompatibleError: the mixture cannot be edited so; lists every reason.
    """
    folder, mixture = opened
    document = _document(mixture, folder.reference, pruning, config) | (
        {"router": {"fitted": True}} if new_routers else {}
    )
    made = parse_config(write_yaml(document), "the pruned mixture", allow_identical_experts=True)
    return plan_edit(made, options, announce=announce, opened=opened)


def _document(mixture: StoredMixture, reference: str, pruning: Pruning, config: MergeConfig | None) -> dict[str, Any]:
    """Write the config of the edit, which says what each kept expert is made of, by layer where layers differ."""
    kept = tuple(pruning.kept.values())
    if pruning.is_uniform:
        changes = Changes(
            keep=[mixture.names[number] for number in kept[0]], experts_per_token=pruning.experts_per_token
        )
        document = edit_document(mixture, reference, changes, config)
    else:
        experts: list[dict[str, Any]] = [{} for _ in kept[0]]
        document = {"base_model": reference, "experts": experts, "experts_per_token": pruning.experts_per_token}
    if not pruning.is_uniform or any(pruning.shares.values()):
        by_expert = zip(*(pruning.made_of(layer) for layer in pruning.kept), strict=True)
        for expert, made_of in zip(document["experts"], by_expert, strict=True):
            by_layer = [made if len(made) > 1 else next(iter(made)) for made in made_of]
            expert |= {"source_model": reference, "by_layer": by_layer}
    for place, factor in enumerate(pruning.factors):
        if factor != 1:
            document["experts"][place]["residual_scale"] = factor
    return document
