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


def test_a_token_takes_no_more_experts_than_the_chosen_groups_hold(tmp_path):
    mixture = make_variant(tmp_path / "mixture", "deepseek_v3, groups")
    document = {"base_model": str(mixture), "experts": [{"source_model": f"{mixture}#{n}"} for n in range(4)]}
    with pytest.raises(IncompatibleError) as error:
        plan_edit(load_config(document | {"experts_per_token": 3}))
    assert error.value.problems == (
        "its router chooses among 2 groups of experts (n_group) and takes experts of 1 (topk_group), which hold 2 of "
        "the 4 experts: experts_per_token is 3, and at most 2 here. Set it (--top-k)",
    )
    assert plan_edit(load_config(document | {"experts_per_token": 2})).experts_per_token == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_switches_an_expert_off_is_not_divided_among_its_parts(tmp_path, dtype):
    mixture, bias = (
        make_variant(tmp_path / "mixture", "ernie4_5_moe"),
        "model.layers.1.mlp.moe_statics.e_score_correction_bias",
    )
    tensors = load_weights(mixture)
    tensors[bias] = torch.tensor([[0.5, -1e4, 0.25, -0.5]], dtype=dtype)
    save_weights(mixture, tensors)
    document = {
        "base_model": str(mixture),
        "experts": [{"source_model": f"{mixture}#{n}"} for n in (0, 1, 2, 3)],
        "granularity": 2,
    }
    edit(plan_edit(load_config(document)), tmp_path / "out", EditOptions())
    expected = torch.tensor([[0.25, 0.25, -1e4, -1e4, 0.125, 0.125, -0.25, -0.25]], dtype=dtype)
    assert torch.equal(load_weights(tmp_path / "out")[bias], expected)
