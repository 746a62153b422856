"""A mixture that is edited, as it will be, to be run before anything is written."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moemerge.checkpoint.numbers import stored_bytes
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.dtypes import CONFIG_DTYPES, HeaderDType
from moemerge.editing.plan import EditPlan
from moemerge.evaluation.runnable import MixtureModel, stored
from moemerge.export.planned_tensors import Planned
from moemerge.routers.rows import Rows


def router_bands(plan: EditPlan, rows: Mapping[int, Rows]) -> dict[str, tuple[Band, ...]]:
    """Make the routers of a plan that are computed, by name, of rows (expert, hidden) of each layer.

    Experts are counted before they are split; parts of one have equal rows.
    """
    found: dict[str, tuple[Band, ...]] = {}
    for name, computed in plan.computed.items():
        dtype = plan.mixture.router(computed.layer).dtype
        parts = np.repeat(rows[computed.layer], plan.config.granularity, axis=0)
        found[name] = ((Piece(stored_bytes(parts, CONFIG_DTYPES[dtype]), dtype),),)
    return found


def preview(whole: MixtureModel, plan: EditPlan, rows: Mapping[int, Rows], seed: int = 0) -> MixtureModel:
    """Make the mixture that a plan will write, to be run without it.

    Args:
        whole: the mixture that is edited.
        plan: the plan.
        rows: rows (expert, hidden) of the routers that are computed, by layer.
        seed: the seed of `noise_scale`.
    """
    routers = router_bands(plan, rows)
    tensors = {}
    for name, output in plan.outputs.items():
        bands = routers.get(name, output.bands)
        dtype: HeaderDType = bands[0][0].dtype if bands else plan.mixture.tensors[name].dtype
        tensors[name] = replace(Planned(name, dtype, output.shape, bands, seed).tensor(), name=name)
    keys = {key: plan.output_config.get(key, value) for key, value in whole.runnable.keys.items()}
    names = plan.config.expert_names
    runnable = stored("the edited mixture", whole.family.model_type, keys, tensors)
    return replace(
        whole,
        runnable=runnable,
        experts=names,
        experts_per_token=plan.experts_per_token,
        tensors=tensors,
    )
