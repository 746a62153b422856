"""Edits that change nothing that a mixture computes: equal logits of transformers' own classes, in float32."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moemerge.config.loading import parse_config
from moemerge.config.yaml_text import write_yaml
from moemerge.editing.granularity import copies_problems, split_problems
from moemerge.editing.planner import plan_edit
from moemerge.editing.slots import Kept
from moemerge.editing.upcycling import Copies, upcycled_mixture
from moemerge.editing.writing import write_edit
from moemerge.errors import IncompatibleError
from moemerge.sources.model_folder import open_model
from moemerge.sources.stored_mixtures import read_stored_mixture
from tests.support.mixtures import EXPERTS, PLAINEST, VARIANTS, Layout, make_variant
from tests.support.models import assert_close, load, logits

# Families whose code differs: separate and stacked experts, biases for the choice alone, shared experts.
USUAL = {PLAINEST[kind] for kind in ("mixtral", "granitemoeshared", "ernie4_5_moe")}
NAMES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
variants = pytest.mark.parametrize("name", NAMES)


def edit(folder: Path, out: Path, experts: list[int], **keys: Any) -> Path:
    """Write the mixture with these of its experts, and other keys of an edit's config."""
    document = {
        "base_model": str(folder),
        "experts": [{"source_model": f"{folder}#{number}"} for number in experts],
        **keys,
    }
    plan = plan_edit(parse_config(write_yaml(document), allow_identical_experts=True))
    write_edit(plan, out, dict)
    return out


@variants
@pytest.mark.parametrize("layout", ["released", "in_memory"])
def test_an_edit_that_changes_nothing(tmp_path: Path, name: str, layout: Layout):
    folder = make_variant(tmp_path / "mixture", name, layout=layout)
    edited = edit(folder, tmp_path / "edited", list(range(EXPERTS)))
    assert torch.equal(logits(load(edited)), logits(load(folder)))


@variants
def test_experts_in_another_order_and_back(tmp_path: Path, name: str):
    folder = make_variant(tmp_path / "mixture", name)
    order = [2, 3, 1, 0]  # which leaves the experts of each group together
    turned = edit(folder, tmp_path / "turned", order)
    back = edit(turned, tmp_path / "back", [order.index(expert) for expert in range(EXPERTS)])
    expected = logits(load(folder))
    assert_close(logits(load(turned)), expected)
    assert torch.equal(logits(load(back)), expected)


@variants
@pytest.mark.parametrize("parts", [2, 3])
def test_every_expert_split(tmp_path: Path, name: str, parts: int):
    folder = make_variant(tmp_path / "mixture", name)
    mixture = read_stored_mixture(open_model(str(folder), print), print)
    if problems := list(split_problems([Kept({})], mixture, parts)):
        with pytest.raises(IncompatibleError, match="(?s).*".join(map(re.escape, problems))):
            edit(folder, tmp_path / "split", list(range(EXPERTS)), granularity=parts)
        return
    split = edit(folder, tmp_path / "split", list(range(EXPERTS)), granularity=parts)
    model = load(split)
    assert_close(logits(model), logits(load(folder)))
    again = read_stored_mixture(open_model(str(split), print), print)
    assert again.experts == parts * EXPERTS
    assert again.expert_width * parts == mixture.expert_width
    assert again.experts_per_token == parts * mixture.experts_per_token


@variants
def test_every_expert_widened_with_zeros(tmp_path: Path, name: str):
    folder = make_variant(tmp_path / "mixture", name)
    wide = edit(folder, tmp_path / "wide", list(range(EXPERTS)), expert_width=56)
    assert read_stored_mixture(open_model(str(wide), print), print).expert_width == 56
    assert_close(logits(load(wide)), logits(load(folder)))


@variants
def test_one_expert_left_out(tmp_path: Path, name: str):
    folder, kept = make_variant(tmp_path / "mixture", name), [0, 2, 3]
    if VARIANTS[name][1].get("n_group", 1) > 1:
        with pytest.raises(
            IncompatibleError, match="2 groups of experts .n_group., which 3 experts do not fill evenly"
        ):
            edit(folder, tmp_path / "edited", kept)
        return
    edited = load(edit(folder, tmp_path / "edited", kept))
    assert_close(logits(edited), logits(without(load(folder), edited.config, kept)))


def without(model: Any, config: Any, kept: list[int]) -> Any:
    """The same model with some of its experts, made by transformers alone."""
    smaller = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tensors = model.state_dict()
    for key, wanted in smaller.state_dict().items():
        # transformers 4 has a module for each expert, transformers 5 a stack.
        given = tensors[re.sub(r"(?<=experts\.)\d+", lambda number: str(kept[int(number[0])]), key)]
        axes = [axis for axis, (new, old) in enumerate(zip(wanted.shape, given.shape, strict=True)) if new != old]
        wanted.copy_(given.index_select(axes[0], torch.tensor(kept)) if axes else given)
    return smaller


@variants
def test_every_expert_twice(tmp_path: Path, name: str):
    folder = make_variant(tmp_path / "mixture", name)
    mixture = read_stored_mixture(open_model(str(folder), print), print)
    try:
        document = upcycled_mixture(str(folder), mixture, Copies(2 * EXPERTS))
    except IncompatibleError:
        assert list(copies_problems(mixture))
        return
    write_edit(plan_edit(parse_config(write_yaml(document), allow_identical_experts=True)), tmp_path / "twice", dict)
    assert_close(logits(load(tmp_path / "twice")), logits(load(folder)))
