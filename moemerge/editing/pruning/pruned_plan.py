"""A pruned mixture: its plan, its routers, and the model that it will be, which runs before anything is written."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moemerge.checkpoint.numbers import stored_bytes
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.config.yaml_text import write_yaml
from moemerge.dtypes import CONFIG_DTYPES, HeaderDType
from moemerge.editing.changes import Changes, edit_document
from moemerge.editing.plan import EditPlan
from moemerge.editing.planner import plan_edit
from moemerge.editing.pruning.choice import Pruning
from moemerge.evaluation.runnable import MixtureModel, stored
from moemerge.export.planned_tensors import Planned
from moemerge.families.stored_mixture import StoredMixture
from moemerge.planning.options import PlanOptions

Rows = Mapping[int, NDArray[np.float32]]


def plan_pruning(
    mixture: StoredMixture,
    reference: str,
    pruning: Pruning,
    config: MergeConfig | None,
    options: PlanOptions,
    *,
    new_routers: bool,
    announce: Callable[[str], None] = lambda _: None,
) -> EditPlan:
    """Plan the pruned mixture.

    Args:
        mixture: the whole mixture.
        reference: its folder.
        pruning: what is kept.
        config: the config that the mixture was made from, if it is known.
        options: the size of shards.
        new_routers: whether router rows change.
        announce: called with a line about each step that takes long.

    Raises:
        IncompatibleError: the mixture cannot be edited so; lists every reason.
    """
    document = _document(mixture, reference, pruning, config) | ({"router": {"fitted": True}} if new_routers else {})
    made = parse_config(write_yaml(document), "the pruned mixture", allow_identical_experts=True)
    return plan_edit(made, options, announce=announce)


def _document(mixture: StoredMixture, reference: str, pruning: Pruning, config: MergeConfig | None) -> dict[str, Any]:
    """Write the config of the edit, which says what each kept expert is made of, by layer where layers differ."""
    kept = tuple(pruning.kept.values())
    if pruning.is_uniform:
        changes = Changes(
            keep=[mixture.names[number] for number in kept[0]], experts_per_token=pruning.experts_per_token
        )
        document = edit_document(mixture, reference, changes, config)
        if not any(pruning.shares.values()):
            return document
    else:
        experts: list[dict[str, Any]] = [{} for _ in kept[0]]
        document = {"base_model": reference, "experts": experts, "experts_per_token": pruning.experts_per_token}
    for place, expert in enumerate(document["experts"]):
        expert |= {"source_model": reference, "by_layer": [_made_of(pruning, layer, place) for layer in pruning.kept]}
    return document


def _made_of(pruning: Pruning, layer: int, place: int) -> int | dict[int, float]:
    """The expert that one is in a layer, or several with their shares, itself first."""
    number = pruning.kept[layer][place]
    shares = pruning.shares[layer].get(number, {})
    return {number: shares[number], **shares} if len(shares) > 1 else number


def router_bands(plan: EditPlan, rows: Rows) -> dict[str, tuple[Band, ...]]:
    """The routers (kept expert, hidden) of a plan, by name."""
    found: dict[str, tuple[Band, ...]] = {}
    for name, computed in plan.computed.items():
        dtype = plan.mixture.router(computed.layer).dtype
        found[name] = ((Piece(stored_bytes(rows[computed.layer], CONFIG_DTYPES[dtype]), dtype),),)
    return found


def preview(whole: MixtureModel, plan: EditPlan, rows: Rows) -> MixtureModel:
    """The mixture that a plan will write, to be run without it."""
    routers = router_bands(plan, rows)
    tensors = {}
    for name, output in plan.outputs.items():
        bands = routers.get(name, output.bands)
        dtype: HeaderDType = bands[0][0].dtype if bands else plan.mixture.tensors[name].dtype
        tensors[name] = replace(Planned(name, dtype, output.shape, bands, 0).tensor(), name=name)
    keys = {key: plan.output_config.get(key, value) for key, value in whole.runnable.keys.items()}
    names = plan.config.expert_names
    runnable = stored("the pruned mixture", whole.family.model_type, keys, tensors, "model.embed_tokens.weight")
    return replace(
        whole,
        runnable=runnable,
        experts=names,
        experts_per_token=plan.config.experts_per_token,
        tensors=tensors,
    )
