"""What a plan is: decided once, and the same for whoever reads it."""

from dataclasses import FrozenInstanceError

import pytest

from moemerge import load_config, plan_merge
from moemerge.errors import RefusedError
from moemerge.planning.options import PlanOptions
from tests.support.models import write_config


def test_nothing_of_a_plan_changes(tmp_path, llamas):
    plan = plan_merge(load_config(write_config(tmp_path / "c.yaml", llamas[0], llamas[1:], gate_mode="random")))
    with pytest.raises(FrozenInstanceError):
        plan.dtype = "float16"
    for table in (
        plan.outputs,
        plan.parts.base.tensors,
        plan.parts.experts[0].tensors,
        plan.origins.stamps,
        plan.origins.references,
    ):
        with pytest.raises(TypeError, match="does not support item assignment"):
            table["model.norm.weight"] = None
    plan.output_config["hidden_size"] = 0
    assert plan.output_config["hidden_size"] == 32


def test_a_shard_has_to_hold_something():
    with pytest.raises(RefusedError) as caught:
        PlanOptions(max_shard_bytes=0)
    assert str(caught.value) == "max_shard_bytes: a shard of at most 0 bytes holds nothing. Choose 1 or more."
