"""The config of a pruned mixture: averages that can be verified, and router rows that it cannot make again."""

import pytest
import torch
import yaml

from moemerge import EditOptions, edit, load_config, merge, plan_edit, plan_merge
from moemerge.errors import IncompatibleError, RefusedError
from tests.support.families import stored
from tests.support.models import PROMPTS, write_config


@pytest.fixture
def mixture(llamas, tmp_path):
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:])
    merge(plan_merge(load_config(config)), tmp_path / "mixture")
    for number, prompts in enumerate(PROMPTS):
        for place, prompt in enumerate([*prompts, *reversed(prompts)]):
            (tmp_path / f"{number}-{place}.txt").write_text(prompt)
    return tmp_path / "mixture"


def test_a_pruned_mixture_with_averages_is_what_its_config_says(mixture, tmp_path, run):
    data = [word for number in range(3) for word in ("--data", f"d{number}={tmp_path}/{number}-*.txt")]
    out = tmp_path / "out"
    code, _, _ = run("prune", mixture, out, "--keep", "2", "--merge", *data, "-q")
    assert code == 0
    config = load_config(out / "moemerge_config.yaml")
    assert config.router.fitted
    assert any(isinstance(made, dict) for expert in config.experts for made in expert.by_layer)
    code, shown, errors = run("verify", out)
    assert (code, errors) == (0, "")
    assert "as planned" in shown
    assert "3 routers" in shown
    with pytest.raises(RefusedError) as error:
        edit(plan_edit(config), tmp_path / "again")
    assert str(error.value) == (
        "router.fitted: the router rows of this mixture were fitted to text by `moemerge prune`, which this config "
        "cannot do again. Prune again, or remove the key, and rows stay as they were before."
    )
    assert not (tmp_path / "again").exists()


def test_an_average_of_experts_has_the_row_of_the_first(mixture, tmp_path):
    document = {
        "base_model": str(mixture),
        "experts": [
            {"source_model": str(mixture), "by_layer": [{2: 0.25, 0: 0.75}, 0, 0], "name": "mean"},
            {"source_model": f"{mixture}#1"},
        ],
    }
    plan = plan_edit(load_config(yaml.safe_dump(document, sort_keys=False)))
    assert plan.dropped == ()
    edit(plan, tmp_path / "out", EditOptions())
    old, new = stored(mixture), stored(tmp_path / "out")
    block = "model.layers.0.block_sparse_moe"
    expected = 0.25 * old[f"{block}.experts.2.w1.weight"] + 0.75 * old[f"{block}.experts.0.w1.weight"]
    assert torch.allclose(new[f"{block}.experts.0.w1.weight"], expected, atol=1e-7)
    assert torch.equal(new[f"{block}.gate.weight"], old[f"{block}.gate.weight"][[2, 1]])


@pytest.mark.parametrize(
    ("by_layer", "problem"),
    [
        ([0, 0], "by_layer names 2 experts, and the mixture has experts in 3 layers"),
        ([0, 0, 7], "by_layer names expert 7, and the mixture's are numbered 0 to 2"),
        ([0, {0: 0.5, 1: 0.25}, 0], "by_layer gives shares of {0: 0.5, 1: 0.25}, which add up to 0.75 and not to 1"),
    ],
)
def test_layers_that_are_told_wrongly_are_refused(mixture, by_layer, problem):
    experts = [{"source_model": str(mixture), "by_layer": by_layer, "name": "one"}, {"source_model": f"{mixture}#1"}]
    with pytest.raises(IncompatibleError) as error:
        plan_edit(load_config({"base_model": str(mixture), "experts": experts}))
    assert error.value.problems == (f"experts[0] (one): {problem}",)
