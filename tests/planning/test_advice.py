"""Advice on routers, which follows what was measured."""

import pytest

from moemerge import load_config, plan_merge

PROMPTS = ["The quick fox.", "A lazy dog."]


def advice(llamas, **settings):
    experts = [{"source_model": str(model), "positive_prompts": PROMPTS} for model in llamas[1:3]]
    experts[1]["positive_prompts"] = ["def main():", "return argv"]
    return plan_merge(load_config({"base_model": str(llamas[0]), "experts": experts, **settings})).advice


@pytest.mark.parametrize("method", ["hidden", "mergekit_hidden", "cheap_embed"])
def test_a_method_that_measured_worse_is_advised_against(llamas, method):
    assert (
        f"gate_mode {method} measured clearly worse than the default on the same prompts: leave gate_mode out, unless "
        "you want just these routers (docs/routers.md)"
    ) in advice(llamas, gate_mode=method)


@pytest.mark.parametrize("method", ["auto", "ridge"])
def test_others_are_not(llamas, method):
    assert not [line for line in advice(llamas, gate_mode=method) if "measured clearly worse" in line]
