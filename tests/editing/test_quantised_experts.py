"""Mixtures whose `quantization_config` names single experts."""

from pathlib import Path

import pytest
import yaml

from moemerge import load_config, plan_edit
from moemerge.editing.plan import EditPlan
from moemerge.errors import IncompatibleError
from tests.support.mixtures import make_mixture
from tests.support.models import edit_json

NAMED = {
    "list": ({"ignore": ["lm_head", "model.layers.0.mlp.experts.1.up_proj"]}, "model.layers.0.mlp.experts.1.up_proj"),
    "pattern": ({"ignore": [r"re:.*experts\.1\..*"]}, r"re:.*experts\.1\..*"),
    "key": ({"groups": {"a": {"layers": {"mlp.experts.3.up_proj": 4}}}}, "mlp.experts.3.up_proj"),
}


def planned(mixture: Path, *experts: int, **keys: object) -> EditPlan:
    named = [{"source_model": f"{mixture}#{number}"} for number in experts]
    return plan_edit(load_config(yaml.safe_dump({"base_model": str(mixture), "experts": named, **keys})))


@pytest.mark.parametrize("place", NAMED)
def test_experts_that_are_quantised_otherwise_keep_their_numbers(tmp_path, place):
    settings, name = NAMED[place]
    mixture = make_mixture(tmp_path / "mixture", "qwen3_moe")
    edit_json(mixture / "config.json", quantization_config=settings)
    for refused in (lambda: planned(mixture, 0, 2, 3), lambda: planned(mixture, 0, 1, 2, 3, granularity=2)):
        with pytest.raises(IncompatibleError) as caught:
            refused()
        assert caught.value.problems == (
            f"quantization_config in its config.json names {name}, and experts would have other numbers. Leave out no "
            "expert but the last ones, or take names of single experts out of config.json first",
        )
    assert planned(mixture, 0, 1, 2).output_config["quantization_config"] == settings


def test_names_that_no_number_is_in_stay(tmp_path):
    mixture = make_mixture(tmp_path / "mixture", "qwen3_moe")
    edit_json(mixture / "config.json", quantization_config={"ignore": ["lm_head", "re:.*mlp.experts$"]})
    assert planned(mixture, 3, 1).experts == 2
