"""What merges of GLM and Gemma say and store beside what their logits show."""

import json

import torch

from moemerge import load_config, merge, plan_merge
from moemerge.families.dense import DenseModel, read_dense
from tests.support.families import DENSE
from tests.support.models import SIZES, load_weights, make_model, write_config


def read(name: str, **keys) -> DenseModel | str:
    model_type, sizes = DENSE[name]
    return read_dense({**SIZES, "model_type": model_type, **sizes, **keys})


def test_norms_of_gemma_are_stored_with_the_number_that_they_add(tmp_path):
    base = make_model(tmp_path / "base", 1, "gemma", head_dim=8)
    config = write_config(tmp_path / "merge.yaml", base, [base, base], prompts=False)
    plan = plan_merge(load_config(config, allow_identical_experts=True))
    assert not any("norms" in note for note in plan.notes)
    merge(plan, tmp_path / "exact")
    config = write_config(tmp_path / "merge.yaml", base, [base, base], prompts=False, dtype="bfloat16")
    plan = plan_merge(load_config(config, allow_identical_experts=True))
    assert [note for note in plan.notes if "norms" in note] == [
        "norms of gemma add 1 to their weights, those of granitemoe do not, so the sums are stored: bfloat16 rounds each "
        "of them, by up to 0.20%; `dtype: float32` is exact"
    ]
    merge(plan, tmp_path / "rounded")
    given, exact, rounded = (load_weights(folder) for folder in (base, tmp_path / "exact", tmp_path / "rounded"))
    norms = [name for name in given if name.endswith("norm.weight")]
    assert len(norms) == 7
    for name in norms:
        assert torch.equal(exact[name], given[name] + 1)
        assert torch.equal(rounded[name], (given[name] + 1).bfloat16())


def test_gemma_scales_embeddings_by_the_root_of_their_width(tmp_path):
    model = read("gemma")
    assert isinstance(model, DenseModel)
    assert model.values["embedding_multiplier"] == SIZES["hidden_size"] ** 0.5
    assert model.facts >= {"multipliers"}


def test_attention_in_both_directions_is_refused():
    assert read("gemma", use_bidirectional_attention=True) == (
        "use_bidirectional_attention is True: only causal attention was proved"
    )


def test_the_config_of_a_glm_says_how_much_of_each_head_rotates(tmp_path):
    base = make_model(tmp_path / "base", 1, "glm", head_dim=8)
    config = write_config(tmp_path / "merge.yaml", base, [base, base], prompts=False)
    merge(plan_merge(load_config(config, allow_identical_experts=True)), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == "glm4_moe"
    assert (said["partial_rotary_factor"], said["rope_parameters"]["partial_rotary_factor"]) == (0.5, 0.5)
    given, made = load_weights(base), load_weights(tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj.bias"
    order = [0, 2, 1, 3, 4, 5, 6, 7]
    assert torch.equal(made[name], given[name].reshape(2, 8)[:, order].flatten())
