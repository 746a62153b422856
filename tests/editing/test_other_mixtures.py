"""Experts of another mixture: what they compute with comes along, or the edit is refused."""

from pathlib import Path

import pytest
import torch

from moemerge import EditOptions, edit, load_config, merge, plan_edit, plan_merge
from moemerge.editing.plan import EditPlan
from moemerge.errors import IncompatibleError
from tests.support.mixtures import make_mixture, make_variant
from tests.support.models import load_weights, make_model, save_weights, write_config

FACTORS = "model.layers.{}.router.per_expert_scale"
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


def joined(one: Path, other: Path, **keys: object) -> EditPlan:
    """Two experts of a mixture with the second of another."""
    experts = [{"source_model": f"{one}#0"}, {"source_model": f"{one}#1"}, {"source_model": f"{other}#1"}]
    return plan_edit(load_config({"base_model": str(one), "experts": experts, "gate_mode": "random", **keys}))


def problems(one: Path, other: Path, **keys: object) -> tuple[str, ...]:
    with pytest.raises(IncompatibleError) as caught:
        joined(one, other, **keys)
    return tuple(caught.value.problems)


def changed(folder: Path, name: str, values: torch.Tensor) -> Path:
    tensors = load_weights(folder)
    tensors[name] = values
    save_weights(folder, tensors)
    return folder


def test_factors_on_what_an_expert_adds_come_along(tmp_path):
    one, other = (make_mixture(tmp_path / name, "gemma4_text") for name in ("one", "other"))
    name = FACTORS.format(1)
    changed(other, name, torch.tensor([1.0, 7.0, 1.0, 1.0]))
    edit(joined(one, other), tmp_path / "out", EditOptions())
    made, old = load_weights(tmp_path / "out")[name], load_weights(one)[name]
    assert made.tolist() == [*old[:2].tolist(), 7.0]


def test_another_scale_before_the_router_is_refused(tmp_path):
    one, other = (make_mixture(tmp_path / name, "gemma4_text") for name in ("one", "other"))
    name = "model.layers.1.router.scale"
    changed(other, name, 2 * load_weights(one)[name])
    assert problems(one, other) == (
        "experts[2] (other-1): its mixture's router.scale differs in layer 1, so its router row would say something else",
    )


def test_factors_without_a_place_are_refused(tmp_path):
    sizes = {"hidden_act": "gelu_pytorch_tanh"}
    one, other = make_mixture(tmp_path / "one", "qwen3_moe", **sizes), make_mixture(tmp_path / "other", "gemma4_text")
    assert (
        "experts[2] (other-1): its mixture multiplies what it adds by router.per_expert_scale, which this one does not have"
        in (problems(one, other))
    )


def test_an_expert_that_its_mixture_switches_off_is_refused(tmp_path):
    one, other = (make_variant(tmp_path / name, "dots1") for name in ("one", "other"))
    changed(other, BIAS.format(2), torch.tensor([0.0, -1e4, 0.0, 0.0]))
    assert problems(one, other) == (
        "experts[2] (other-1): it is switched off in layer 2 of its mixture, which has no FFN of it there",
    )


def test_a_mixture_of_more_layers_is_refused(tmp_path):
    one, other = (
        make_mixture(tmp_path / "one", "mixtral"),
        make_mixture(tmp_path / "other", "mixtral", num_hidden_layers=5),
    )
    assert problems(one, other) == ("experts[2] (other-1): its mixture has 5 layers, this one 3",)


def test_halves_that_do_not_fit_are_not_averaged(tmp_path):
    one, other = make_mixture(tmp_path / "one", "mixtral"), make_mixture(tmp_path / "other", "mixtral", vocab_size=192)
    assert problems(one, other, shared_weights="average") == (
        "shared_weights: average: another mixture has no tensor lm_head.weight of shape [160, 32]. Remove the key: "
        "the mixture's own stay",
    )


def test_a_mixture_under_two_names_counts_once_in_averages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = make_mixture(tmp_path / "one", "mixtral"), make_mixture(tmp_path / "other", "mixtral", seed=1)
    experts = [{"source_model": source} for source in (f"{one}#0", "other#1", "./other/#2")]
    document = {"base_model": str(one), "experts": experts, "gate_mode": "random", "shared_weights": "average"}
    edit(plan_edit(load_config(document)), tmp_path / "out", EditOptions())
    name = "model.layers.1.self_attn.q_proj.weight"
    made, ours, theirs = (load_weights(folder)[name] for folder in (tmp_path / "out", one, other))
    torch.testing.assert_close(made, (ours + theirs) / 2)


def test_a_gemma_joins_a_mixture_of_gemmas_whose_norms_hold_the_sum(tmp_path):
    """The edited mixture has every tensor that a merge of all three has, but for the routers."""
    one, two, three = (
        make_model(tmp_path / f"gemma{seed}", seed, "gemma", head_dim=8, tuned_from=None if seed == 1 else 1)
        for seed in (1, 2, 3)
    )
    for name, experts in (("pair", [one, two]), ("all", [one, two, three])):
        config = write_config(tmp_path / f"{name}.yaml", one, experts, prompts=False)
        merge(plan_merge(load_config(config)), tmp_path / name)
    sources = [f"{tmp_path / 'pair'}#0", f"{tmp_path / 'pair'}#1", str(three)]
    document = {"base_model": str(tmp_path / "pair"), "gate_mode": "random"}
    plan = plan_edit(load_config(document | {"experts": [{"source_model": source} for source in sources]}))
    edit(plan, tmp_path / "out", EditOptions())
    found, expected = (load_weights(tmp_path / name) for name in ("out", "all"))
    assert found.keys() == expected.keys()
    routers = {name for name in expected if "router" in name}
    assert len(routers) == plan.mixture.layers
    assert all(torch.equal(found[name], expected[name]) for name in expected.keys() - routers)


def test_an_expert_without_text_keeps_its_row_beside_one_that_is_fitted(tmp_path):
    base = make_model(tmp_path / "base")
    dense = [make_model(tmp_path / f"d{n}", n, tuned_from=0) for n in (1, 2, 3, 4)]
    for name, pair in (("one", dense[:2]), ("other", dense[1:3])):
        merge(plan_merge(load_config(write_config(tmp_path / f"{name}.yaml", base, pair))), tmp_path / name)
    experts = [
        *({"source_model": f"{tmp_path / 'one'}#{n}"} for n in (0, 1)),
        {"source_model": f"{tmp_path / 'other'}#1"},
        {"source_model": str(dense[3]), "positive_prompts": ["The quick fox jumps", "The lazy dog sleeps"]},
    ]
    edit(
        plan_edit(load_config({"base_model": str(tmp_path / "one"), "experts": experts})),
        tmp_path / "out",
        EditOptions(),
    )
    for layer in range(3):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        made, one, other = (load_weights(tmp_path / folder)[name] for folder in ("out", "one", "other"))
        assert torch.equal(made[:3], torch.stack([*one, other[1]]))
        assert not torch.allclose(made[3], one.mean(dim=0), atol=1e-4)
