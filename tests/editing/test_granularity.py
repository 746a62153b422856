"""What splitting, widening and copying experts refuse, and what they say of themselves."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moemerge import load_config, merge, plan_merge
from moemerge.checks.verification import verify_merge
from moemerge.cli.app import main
from moemerge.config.loading import parse_config
from moemerge.config.yaml_text import write_yaml
from moemerge.editing.plan import EditPlan
from moemerge.editing.planner import plan_edit
from moemerge.editing.writing import write_edit
from moemerge.errors import IncompatibleError
from tests.support.mixtures import EXPERTS, make_mixture, make_variant
from tests.support.models import assert_close, load, load_weights, logits, make_model, save_weights, write_config

TIES = (
    "granularity: equal logits keep the parts of an expert together. Where two experts' logits are equal at the border "
    "of the chosen ones, transformers on a CPU and llama.cpp may choose parts of both: for about 1 token in 5000 of a "
    "layer in bfloat16, hardly ever in float32"
)


def planned(folder: Path, **keys: Any) -> EditPlan:
    experts = [{"source_model": f"{folder}#{number}"} for number in range(EXPERTS)]
    return plan_edit(parse_config(write_yaml({"base_model": str(folder), "experts": experts, **keys})))


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(IncompatibleError) as error:
        planned(folder, **keys)
    return str(error.value).removeprefix("This mixture cannot be edited so:\n  - ")


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moemerge", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_parts_have_equally_many_neurons(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    assert (
        refusal(folder, granularity=5) == "granularity: the mixture's experts have 48 neurons, which 5 does not divide"
    )


def test_a_shared_expert_as_wide_as_the_others_cannot_stay(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "hunyuan_v1_moe")
    assert refusal(folder, granularity=2) == (
        "granularity: a hunyuan_v1_moe has one shared expert that is as wide as the others, and would be 2 times as wide"
    )


def test_parts_would_count_twice_for_their_group(tmp_path):
    folder = make_variant(tmp_path / "mixture", "deepseek_v3, groups")
    assert refusal(folder, granularity=2) == (
        "its router chooses among 2 groups of experts (n_group) by the two highest scores in each, which would be those "
        "of one expert's parts or copies"
    )


def test_neurons_are_never_left_out(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    assert refusal(folder, expert_width=40) == (
        "expert_width: 40 is less than the 48 neurons that an expert has; neurons are never left out"
    )
    assert planned(folder, expert_width=40, granularity=2).output_config["intermediate_size"] == 40


def test_quantised_experts_are_not_split(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    tensors = load_weights(folder)
    save_weights(folder, {name: t.to(torch.int8) if ".experts." in name else t for name, t in tensors.items()})
    assert refusal(folder, granularity=2) == (
        "its experts are stored as I8, so they can be kept, left out and put into another order, but nothing can be "
        "added beside them, and they cannot be changed or split; that needs one of float32, float16, bfloat16"
    )
    write_edit(planned(folder), tmp_path / "edited", dict)
    assert load_weights(tmp_path / "edited")["model.layers.0.block_sparse_moe.experts.0.w1.weight"].dtype == torch.int8


def test_a_merge_of_dense_models_has_neither(tmp_path):
    base, expert = (make_model(tmp_path / str(seed), seed) for seed in range(2))
    config = load_config(
        write_config(tmp_path / "merge.yaml", base, [base, expert], prompts=False, granularity=2, expert_width=64)
    )
    with pytest.raises(IncompatibleError) as error:
        plan_merge(config)
    assert str(error.value).splitlines()[1:] == [
        f"  - {key}: changes the experts of a mixture, and base_model is none: merge first, then edit the result"
        for key in ("granularity", "expert_width")
    ]


def test_notes_say_where_it_is_not_exact(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    assert planned(folder, granularity=3).notes == (TIES,)
    model = load(folder).to(torch.bfloat16)
    model.save_pretrained(folder)
    assert planned(folder, granularity=2).notes == (TIES,)
    assert planned(folder, granularity=3).notes == (
        "granularity: 3 times the down projections is rounded to BF16; with a power of two, the numbers stay exact",
        TIES,
    )


def test_the_command_splits_and_widens_and_draws_routers_for_experts_not_parts(tmp_path, monkeypatch, capsys):
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe")
    flags = ("--granularity", "2", "--width", "16")
    assert run(monkeypatch, "edit", str(folder), str(tmp_path / "split"), *flags) == 0
    shown = capsys.readouterr().out
    assert "granularity: 2\nexpert_width: 16\n" in shown
    assert "qwen3_moe, 8 experts (from 4), 4 per token (from 2)" in shown
    assert_close(logits(load(tmp_path / "split")), logits(load(folder)))
    config = parse_config((tmp_path / "split" / "moemerge_config.yaml").read_text(), folder=tmp_path / "split")
    drawn = tmp_path / "drawn.yaml"
    drawn.write_text(
        write_yaml(config.model_dump(exclude_defaults=True) | {"base_model": str(folder), "gate_mode": "random"})
    )
    assert run(monkeypatch, str(drawn), str(tmp_path / "drawn")) == 0
    rows = load_weights(tmp_path / "drawn")["model.layers.0.mlp.gate.weight"].numpy()
    assert np.array_equal(rows[::2], rows[1::2])
    assert len(np.unique(rows, axis=0)) == EXPERTS


def test_upcycle_copies_a_dense_model(tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path / "model")
    assert run(monkeypatch, "upcycle", str(model), str(tmp_path / "out"), "--experts", "4") == 0
    assert_close(logits(load(tmp_path / "out")), logits(load(model)))
    flags = ("--experts", "4", "--experts-per-token", "3", "--reinit", "0.5", "--noise-scale", "0.01", "--seed", "5")
    assert run(monkeypatch, "upcycle", str(model), str(tmp_path / "drawn"), *flags) == 0
    config = load_config(tmp_path / "drawn" / "moemerge_config.yaml", allow_identical_experts=True)
    assert config.experts_per_token == 3
    assert [expert.reinit.seed for expert in config.experts if expert.reinit] == [5] * 4
    assert not verify_merge(plan_merge(config), tmp_path / "drawn", seed=5).differences
    assert json.loads((tmp_path / "drawn" / "config.json").read_text())["num_experts_per_tok"] == 3


def test_upcycle_has_every_expert_of_a_mixture_several_times(tmp_path, monkeypatch, capsys):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    assert run(monkeypatch, "upcycle", str(folder), str(tmp_path / "out"), "--experts", "8") == 0
    assert "mixtral, 8 experts (from 4), 4 per token (from 2)" in capsys.readouterr().out
    assert_close(logits(load(tmp_path / "out")), logits(load(folder)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--experts", "6"),
            "--experts: {model} has 4 experts, each of which is to be there several times: expected 8, 12, 16 or "
            "another multiple, found 6.",
        ),
        (
            ("--experts", "8", "--experts-per-token", "9"),
            "--experts-per-token: 9 of 8 experts. Choose a smaller number.",
        ),
        (("--reinit", "0"), "--reinit: 0 draws no neurons anew. Leave it out."),
    ],
)
def test_upcycle_refuses_what_is_no_copy(tmp_path, monkeypatch, capsys, flags, message):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    assert run(monkeypatch, "upcycle", str(folder), str(tmp_path / "out"), *flags) == 2
    assert capsys.readouterr().err == f"error: {message.format(model=folder)}\n"


def test_biases_beside_a_softmax_do_not_fit_copies(tmp_path, monkeypatch, capsys):
    folder = make_mixture(tmp_path / "mixture", "ernie4_5_moe")
    capsys.readouterr()  # transformers shows what it saves, if no test before has made the mixture
    assert run(monkeypatch, "upcycle", str(folder), str(tmp_path / "out"), "--experts", "8") == 2
    assert capsys.readouterr().err == (
        "error: This mixture cannot be upcycled:\n"
        "  - a ernie4_5_moe adds biases to a softmax over all experts for the choice, which would be the same beside "
        "smaller numbers\n"
    )


def test_a_merged_mixture_stays_exact_when_it_is_split(tmp_path):
    base, *experts = (make_model(tmp_path / str(seed), seed) for seed in range(3))
    merge(
        plan_merge(load_config(write_config(tmp_path / "merge.yaml", base, experts, prompts=False))),
        tmp_path / "mixture",
    )
    document = {
        "base_model": str(tmp_path / "mixture"),
        "experts": [{"source_model": f"{tmp_path / 'mixture'}#{n}"} for n in "12"],
    }
    write_edit(plan_edit(parse_config(write_yaml({**document, "granularity": 2}))), tmp_path / "split", dict)
    assert_close(logits(load(tmp_path / "split")), logits(load(tmp_path / "mixture")))


def test_copies_take_part_in_equally_many_layers(tmp_path, monkeypatch, capsys):
    folder = make_variant(tmp_path / "mixture", "hunyuan_v1_moe, lists by layer")
    capsys.readouterr()  # transformers' bar of the write
    assert run(monkeypatch, "upcycle", str(folder), str(tmp_path / "out"), "--experts", "8") == 2
    assert capsys.readouterr().err == (
        "error: This mixture cannot be upcycled:\n"
        "  - its layers differ in how many experts take each token, 1 to 2, and the result's would not\n"
    )


def test_groups_of_other_experts_are_a_warning(tmp_path):
    folder = make_variant(tmp_path / "mixture", "glm4_moe, groups", n_routed_experts=8)
    warning = (
        "its router first chooses among 2 groups of experts that follow each other (n_group), and these are other "
        "experts now: tokens go to other experts than before, even where both are still there"
    )
    same, mixed, fewer = (4, 6, 5, 7, 3, 2, 1, 0), (0, 1, 2, 4, 3, 5, 6, 7), (0, 1, 2, 4, 5, 6)
    for order, warnings in {same: (), mixed: (warning,), fewer: (warning,)}.items():
        experts = [{"source_model": f"{folder}#{number}"} for number in order]
        plan = plan_edit(parse_config(write_yaml({"base_model": str(folder), "experts": experts})))
        assert plan.warnings == warnings


def test_widths_that_transformers_cannot_multiply_are_noted(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    assert planned(folder, expert_width=50).notes[1:] == (
        "experts have 50 neurons: transformers 5 multiplies experts on a CPU only if a row of them takes a multiple of "
        "16 bytes; elsewhere, multiples of 64 or more are fast",
    )
    write_edit(planned(folder, expert_width=50), tmp_path / "wide", dict)
    model = load(tmp_path / "wide")
    if transformers.__version__.startswith("4."):
        assert_close(logits(model), logits(load(folder)))
        return
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        logits(model)


@pytest.mark.parametrize(
    ("flags", "key"), [(("--granularity", "2"), "granularity"), (("--width", "64"), "expert_width")]
)
def test_nothing_stays_in_place_where_every_expert_changes(tmp_path, monkeypatch, capsys, flags, key):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    assert run(monkeypatch, "edit", str(folder), "--in-place", *flags, "-q") == 2
    assert capsys.readouterr().err == (
        f"error: {key}: changes every expert, so that none stays in place. Write to another folder.\n"
    )
