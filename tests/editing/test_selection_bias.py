"""Selection biases and groups of experts in edits of released kinds of mixtures."""

import pytest
import torch
import yaml

from moemerge import EditOptions, edit, load_config, plan_edit
from moemerge.errors import IncompatibleError
from tests.support.mixtures import make_variant
from tests.support.models import load_weights, make_model, save_weights

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def test_a_new_expert_has_the_mean_bias_of_those_that_stay(tmp_path):
    mixture = make_variant(tmp_path / "mixture", "dots1")
    tensors = load_weights(mixture)
    tensors[BIAS] = torch.tensor([3.0, 5.0, 10.0, 40.0])
    save_weights(mixture, tensors)
    dense = make_model(tmp_path / "dense", 3, intermediate_size=24)
    document = {
        "base_model": str(mixture),
        "experts": [{"source_model": f"{mixture}#{n}"} for n in (2, 0)] + [{"source_model": str(dense)}],
        "gate_mode": "random",
    }
    edit(plan_edit(load_config(yaml.safe_dump(document))), tmp_path / "out", EditOptions())
    assert load_weights(tmp_path / "out")[BIAS].tolist() == [10.0, 3.0, 6.5]


def test_groups_that_would_be_too_small_are_refused(tmp_path):
    mixture = make_variant(tmp_path / "mixture", "dots1, groups")
    document = {"base_model": str(mixture), "experts": [{"source_model": f"{mixture}#{n}"} for n in (0, 2)]}
    with pytest.raises(IncompatibleError) as error:
        plan_edit(load_config(document | {"experts_per_token": 1}))
    assert error.value.problems == (
        "its router chooses among 2 groups of experts (n_group) by the 2 best of each, and 2 experts are 1 in each",
    )
