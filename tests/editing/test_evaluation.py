"""`moemerge eval` of edited mixtures: what they are compared with."""

import pytest
import torch

from moemerge import EvaluationSettings, evaluate, load_config, merge, plan_merge
from moemerge.editing.planner import plan_edit
from moemerge.editing.writing import write_edit
from moemerge.evaluation.figures import MERGED, UNEDITED
from tests.support.models import TEXT, load, tokenizer, write_config


@pytest.fixture(scope="module")
def edited(llamas, tmp_path_factory):
    """A mixture, and what it became without one of its experts."""
    root = tmp_path_factory.mktemp("edited")
    config = write_config(root / "merge.yaml", llamas[0], llamas[1:], prompts=False)
    merge(plan_merge(load_config(config)), root / "whole")
    document = {
        "base_model": str(root / "whole"),
        "experts": [{"source_model": f"{root / 'whole'}#{name}", "name": name} for name in ("fox", "chat")],
    }
    write_edit(plan_edit(load_config(document)), root / "edited", dict)
    (root / "text.txt").write_text(TEXT)
    return root


def loss(model) -> float:
    """Mean loss over the tokens of the text behind the first, in nats."""
    ids = torch.tensor([tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))


def test_it_stands_beside_the_mixture_before_the_edit_and_each_of_its_experts(edited, llamas, tmp_path):
    settings = EvaluationSettings(compute_dtype="float32", kept_losses=tmp_path / "kept")
    found = evaluate(edited / "edited", {"chat": [str(edited / "text.txt")]}, settings)
    expected = {
        MERGED: loss(load(edited / "edited")),
        UNEDITED: loss(load(edited / "whole")),
    }
    base = load(llamas[0])
    for name, dense in (("fox", llamas[1]), ("chat", llamas[3])):
        expert, own = load(dense), base.state_dict()
        ffns = {key: value for key, value in expert.state_dict().items() if ".mlp." in key}
        expert.load_state_dict({**own, **ffns})
        expected[f"expert {name}"] = loss(expert)
    assert found.losses.keys() == expected.keys()
    for name, value in expected.items():
        assert found.losses[name]["chat"].value == pytest.approx(value, abs=1e-5)
    again = evaluate(edited / "edited", {"chat": [str(edited / "text.txt")]}, settings)  # by kept losses
    assert again.losses == found.losses
