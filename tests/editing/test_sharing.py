"""Edits on file systems that share blocks: what stays takes no room."""

import os
from pathlib import Path

import pytest

from moemerge import PlanOptions, load_config, merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.config.yaml_text import write_yaml
from moemerge.editing.dense.dense_plan import write_dense
from moemerge.editing.dense.extracting import plan_extract
from moemerge.editing.planner import plan_edit
from moemerge.editing.verifying import verify_edit
from moemerge.editing.writing import write_edit
from tests.checkpoint.test_extents import disk, small  # noqa: F401  fixtures
from tests.support.families import stored
from tests.support.models import make_model, write_config


def made_on(folder: Path) -> Path:
    """A mixture of three experts of some megabytes."""
    models = [
        make_model(folder / name, seed, hidden_size=256, intermediate_size=2048) for seed, name in enumerate("abc")
    ]
    config = write_config(folder / "merge.yaml", models[0], models, prompts=False)
    merge(plan_merge(load_config(config), PlanOptions(target=folder / "mixture")), folder / "mixture")
    return folder / "mixture"


def taken(folder: Path) -> int:
    os.sync()
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("disk", ["xfs"], indirect=True)
def test_on_such_a_file_system_edits_and_extracted_experts_take_no_room(disk, small):  # noqa: F811
    mixture = made_on(disk)
    experts = [{"source_model": f"{mixture}#{number}"} for number in (2, 0)]
    config = parse_config(write_yaml({"base_model": str(mixture), "experts": experts}))
    plan = plan_edit(config, PlanOptions(target=disk / "out"))
    dense = plan_extract(f"{mixture}#1", options=PlanOptions(target=disk / "dense"))
    for planned in (plan, dense):
        assert planned.shared_bytes > 0.95 * planned.output_bytes
    before = taken(disk)
    write_edit(plan, disk / "out", dict)
    write_dense(dense, disk / "dense")
    unshared = sum(planned.output_bytes - planned.shared_bytes for planned in (plan, dense))
    assert taken(disk) - before < unshared + 2**21
    assert verify_edit(plan, disk / "out").differences == ()
    name, own = "model.layers.1.block_sparse_moe.experts.1.w2.weight", "model.layers.1.mlp.down_proj.weight"
    assert stored(mixture)[name].equal(stored(disk / "dense")[own])
    assert plan_edit(config, PlanOptions(target=disk.parent / "out")).shared_bytes == 0
    assert plan_edit(config).shared_bytes == 0
