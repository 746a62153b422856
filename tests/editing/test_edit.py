"""`moemerge edit`: what is kept, left out and added, byte for byte, and what a command line or config may ask for."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.header import read_header
from tests.passes.test_passes import IS_V4
from tests.support.families import DENSE, stored
from tests.support.mixtures import make_variant
from tests.support.models import load, make_model, write_config

IDS = torch.tensor([[1, 5, 9, 30, 77, 12, 4, 101]])


@pytest.fixture(scope="module")
def mixture(llamas, tmp_path_factory) -> Path:
    """A mixture of four experts with random routers, called base, fox, code and chat."""
    root = tmp_path_factory.mktemp("mixture")
    config = write_config(root / "merge.yaml", llamas[0], llamas, prompts=False)
    merge(plan_merge(load_config(config)), root / "mixture")
    return root / "mixture"


def chosen(model, experts):
    """A Mixtral of transformers with some of its experts alone, in this order."""
    for layer in model.model.layers:
        block = layer.block_sparse_moe if IS_V4 else layer.mlp
        if IS_V4:
            block.experts = torch.nn.ModuleList(block.experts[expert] for expert in experts)
            block.gate.weight = torch.nn.Parameter(block.gate.weight[experts])
            block.num_experts = len(experts)
            continue
        block.experts.gate_up_proj = torch.nn.Parameter(block.experts.gate_up_proj[experts])
        block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj[experts])
        block.experts.num_experts = len(experts)
        block.gate.weight = torch.nn.Parameter(block.gate.weight[experts])
        block.gate.num_experts = len(experts)
    return model


@pytest.mark.parametrize(
    ("flags", "result"),
    [
        (["--drop", "fox"], {"base": 0, "code": 2, "chat": 3}),
        (["--drop", "fox,3"], {"base": 0, "code": 2}),
        (["--keep", "3,fox,0"], {"chat": 3, "fox": 1, "base": 0}),
        (["--order", "chat,code,fox,base"], {"chat": 3, "code": 2, "fox": 1, "base": 0}),
        (["--keep", "0,1,2", "--drop", "1", "--rename", "code=py"], {"base": 0, "py": 2}),
    ],
)
def test_experts_that_stay_compute_what_they_did(mixture, tmp_path, run, flags, result):
    out = tmp_path / "out"
    assert run("edit", mixture, out, *flags, "-q") == (0, "", "")
    with torch.no_grad():
        expected = chosen(load(mixture), [*result.values()])(IDS).logits
        assert (load(out)(IDS).logits - expected).abs().max() < 1e-6
    assert list(load_config(out / "moemerge_config.yaml").expert_names) == [*result]
    assert run("verify", out)[0] == 0


def test_without_changes_every_tensor_and_the_config_are_the_same(mixture, tmp_path, run):
    assert run("edit", mixture, tmp_path / "out", "-q") == (0, "", "")
    old, new = ({path.name: path for path in folder.iterdir()} for folder in (mixture, tmp_path / "out"))
    assert old.keys() == new.keys()
    for name in old.keys() - {"README.md", "moemerge_config.yaml"}:
        assert old[name].read_bytes() == new[name].read_bytes()


def test_a_config_says_the_same_as_the_command_line(mixture, tmp_path, run):
    code, shown, errors = run("edit", mixture, tmp_path / "out", "--drop", "fox", "--top-k", "1", "--dry-run")
    assert (code, errors) == (
        0,
        "note: fox: left out; tokens that chose it now take what they would have chosen next, since the other router "
        "rows stay as they are\n",
    )
    assert not (tmp_path / "out").exists()
    text = shown[: shown.index("\n\n")]
    assert yaml.safe_load(text) == {
        "base_model": str(mixture),
        "experts": [{"source_model": f"{mixture}#{name}", "name": name} for name in ("base", "code", "chat")],
        "experts_per_token": 1,
    }
    (tmp_path / "edit.yaml").write_text(text)
    planned, last = (
        run("plan", tmp_path / "edit.yaml")[1],
        f"{tmp_path / 'out'}: nothing was written, since this was a dry run.\n",
    )
    assert shown[shown.index("\n\n") + 2 :] == planned + last
    for name, value in (("--ray", "local"), ("--workers", "2")):
        assert run(tmp_path / "edit.yaml", tmp_path / "by config", name, value) == (
            2,
            "",
            f"error: {name}: base_model is a mixture, so this config describes an edit, which has no such option. Write "
            "into a folder; `moemerge push` sends it.\n",
        )
    assert run(tmp_path / "edit.yaml", tmp_path / "by config", "-q") == (0, "", "")
    assert run("edit", mixture, tmp_path / "by flags", "--drop", "fox", "--top-k", "1", "-q") == (0, "", "")
    for name in ("config.json", *(path.name for path in (tmp_path / "by flags").glob("model*"))):
        assert (tmp_path / "by config" / name).read_bytes() == (tmp_path / "by flags" / name).read_bytes()


def test_prompts_and_texts_of_kept_experts_stay_in_the_config(llamas, tmp_path, run):
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas)
    merge(plan_merge(load_config(config)), tmp_path / "mixture")
    assert run("edit", tmp_path / "mixture", tmp_path / "out", "--drop", "base", "-q")[0] == 0
    before = load_config(tmp_path / "mixture" / "moemerge_config.yaml").experts
    after = load_config(tmp_path / "out" / "moemerge_config.yaml").experts
    assert [expert.positive_prompts for expert in after] == [expert.positive_prompts for expert in before[1:]]


def test_a_wider_dense_model_widens_the_others_with_zeros(mixture, tmp_path, run, capsys):
    wide = make_model(tmp_path / "wide", 9, intermediate_size=64)
    capsys.readouterr()  # of transformers, which made it
    document = {
        "base_model": str(mixture),
        "experts": [{"source_model": f"{mixture}#fox"}, {"source_model": f"{mixture}#2"}, {"source_model": str(wide)}],
        "gate_mode": "random",
    }
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(document))
    code, _, errors = run(tmp_path / "edit.yaml", tmp_path / "out")
    assert (code, errors) == (
        0,
        "note: the mixture's experts have 48 neurons and are padded with zeros to 64, which changes nothing that they "
        "compute\n",
    )
    old, new, dense = stored(mixture), stored(tmp_path / "out"), stored(wide)
    experts = "model.layers.1.block_sparse_moe.experts"
    assert torch.equal(new[f"{experts}.0.w1.weight"][:48], old[f"{experts}.1.w1.weight"])
    assert not new[f"{experts}.0.w1.weight"][48:].any()
    assert torch.equal(new[f"{experts}.0.w2.weight"][:, :48], old[f"{experts}.1.w2.weight"])
    assert not new[f"{experts}.0.w2.weight"][:, 48:].any()
    assert torch.equal(new[f"{experts}.2.w3.weight"], dense["model.layers.1.mlp.up_proj.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 64
    assert load(tmp_path / "out")(IDS).logits.isfinite().all()


def test_every_layer_may_keep_other_experts(mixture, tmp_path, run):
    document = {
        "base_model": str(mixture),
        "experts": [
            {"source_model": str(mixture), "by_layer": [0, 2, 1], "name": "first"},
            {"source_model": str(mixture), "by_layer": [3, 3, 0], "name": "second"},
        ],
    }
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(document))
    assert run(tmp_path / "edit.yaml", tmp_path / "out", "-q") == (0, "", "")
    old, new = stored(mixture), stored(tmp_path / "out")
    for layer, kept in enumerate([(0, 3), (2, 3), (1, 0)]):
        block = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(new[f"{block}.gate.weight"], old[f"{block}.gate.weight"][list(kept)])
        for number, expert in enumerate(kept):
            assert torch.equal(new[f"{block}.experts.{number}.w2.weight"], old[f"{block}.experts.{expert}.w2.weight"])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--drop", "foxes"], "--drop: there is no expert 'foxes'; there are base, fox, code, chat."),
        (["--keep", "0,7"], "--keep: there is no expert '7'; there are base, fox, code, chat."),
        (["--drop", "fox,,1"], "--drop: expected names or numbers between commas, found 'fox,,1'."),
        (["--order", "fox,code,chat"], "--order: expected each of base, fox, code, chat once; it leaves out base."),
        (["--order", "fox,fox,code,chat,base"], "--order: expected each of base, fox, code, chat once; it names an expert twice."),
        (["--rename", "fox"], "--rename: expected OLD=NEW, found 'fox'."),
        (["--add", "fox=model"], "--add: there is an expert called 'fox' already. Choose another name."),
        (["--replace", "fox=a", "--replace", "fox=b"], "--replace: fox is given 2 times: a, b. Give it once."),
        (
            ["--drop", "fox,code,chat"],
            "a mixture has at least 2 experts, and 1 would be left. `moemerge extract {mixture}#base OUT` makes a dense "
            "model of one.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_edited_so_is_said(mixture, tmp_path, run, flags, problem):
    code, _, errors = run("edit", mixture, tmp_path / "out", *flags)
    assert code == 2
    assert errors == f"error: {problem.format(mixture=mixture)}\n"
    assert not (tmp_path / "out").exists()


def test_a_dense_model_that_does_not_fit_is_refused_with_every_reason(mixture, tmp_path, run, capsys):
    make_model(tmp_path / "other", 5, hidden_size=64)
    make_model(tmp_path / "act", 5, hidden_act="gelu")
    make_model(tmp_path / "short", 5, num_hidden_layers=2)
    make_model(tmp_path / "deep", 5, num_hidden_layers=6)
    added = [word for name in ("other", "act", "short", "deep") for word in ("--add", f"{name}={tmp_path / name}")]
    capsys.readouterr()  # of transformers, which made them
    assert run("edit", mixture, tmp_path / "out", "-q", *added) == (
        2,
        "",
        "error: This mixture cannot be edited so:\n"
        "  - experts[4] (other): its hidden_size is 64, the mixture's 32\n"
        "  - experts[5] (act): its FFN's activation is gelu, the mixture's silu\n"
        "  - experts[6] (short): it has 2 layers, the mixture 3\n"
        "  - experts[7] (deep): it has 6 layers, the mixture 3\n",
    )


def test_keys_of_merges_are_refused(mixture, tmp_path, run):
    document = {
        "base_model": str(mixture),
        "experts": [
            {"source_model": f"{mixture}#0", "layers": "0-1", "name": "one"},
            {"source_model": f"{mixture}#x", "name": "other"},
        ],
        "dtype": "float32",
        "tokenizer": "union",
        "shared_weights": "average",
    }
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(document))
    code, _, errors = run(tmp_path / "edit.yaml", tmp_path / "out")
    assert (code, errors.splitlines()) == (
        2,
        [
            "error: This mixture cannot be edited so:",
            "  - dtype: the mixture's own stays, since base_model is a mixture. Remove the key",
            "  - tokenizer: the mixture's own stays, since base_model is a mixture. Remove the key",
            "  - shared_weights: average: the mixture's own attention and norms stay; `average` mixes them with those of other mixtures whose experts are added. Remove the key",
            "  - experts[0] (one): layers: every expert of an edited mixture is in all its layers",
            "  - experts[1] (other): the mixture has no expert 'x': name one by its number, 0 to 3, or base, fox, code, chat",
        ],
    )


def test_a_source_that_changes_is_noticed_and_nothing_is_written(mixture, tmp_path, run, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in mixture.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    from moemerge.editing import writing

    original = writing.write_card

    def changed(*arguments):
        (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
        return original(*arguments)

    monkeypatch.setattr(writing, "write_card", changed)
    code, _, errors = run("edit", copy, tmp_path / "out", "-q")
    assert code == 1
    assert "was changed while it was read" in errors
    assert not (tmp_path / "out").exists()
    assert read_header(copy / "model-00001-of-00002.safetensors")


def test_experts_of_another_mixture_join_and_the_shared_halves_are_averaged(mixture, llamas, tmp_path, run, capsys):
    make_model(tmp_path / "base", 7)
    config = write_config(tmp_path / "merge.yaml", tmp_path / "base", [llamas[3], llamas[0]], prompts=False)
    merge(plan_merge(load_config(config)), tmp_path / "other")
    capsys.readouterr()  # of transformers, which made the base
    document = {
        "base_model": str(mixture),
        "experts": [
            {"source_model": f"{mixture}#fox"}, {"source_model": f"{tmp_path / 'other'}#1", "residual_scale": 0.5},
        ],
        "gate_mode": "random",
        "shared_weights": "average",
    }  # fmt: skip
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(document))
    assert run(tmp_path / "edit.yaml", tmp_path / "out", "-q") == (0, "", "")
    one, two, new, dense = map(stored, (mixture, tmp_path / "other", tmp_path / "out", llamas[0]))
    query, down = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert torch.allclose(new[query], (4 * one[query] + 2 * two[query]) / 6, atol=1e-7)
    assert torch.equal(new[down.format(0)], one[down.format(1)])
    assert torch.equal(new[down.format(1)], 0.5 * dense["model.layers.1.mlp.down_proj.weight"])
    assert run("verify", tmp_path / "out", "-q") == (0, "", "")


def test_numbers_never_become_names_that_mean_other_places(tmp_path, run):
    """A mixture without names: what comes out of it in another order has no names that are numbers."""
    mixture = make_variant(tmp_path / "mixture", "mixtral")
    assert run("edit", mixture, tmp_path / "turned", "--order", "3,2,1,0", "-q")[0] == 0
    assert run("edit", tmp_path / "turned", tmp_path / "two", "--keep", "0,1", "-q")[0] == 0
    old, new = stored(mixture), stored(tmp_path / "two")
    block = "model.layers.1.block_sparse_moe"
    assert torch.equal(new[f"{block}.gate.weight"], old[f"{block}.gate.weight"][[3, 2]])


def test_a_config_that_does_not_say_takes_as_many_experts_per_token_as_before(tmp_path, run):
    mixture = make_variant(tmp_path / "mixture", "mixtral", num_experts_per_tok=3)
    document = {"base_model": str(mixture), "experts": [{"source_model": f"{mixture}#{n}"} for n in (0, 1, 2, 3)]}
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(document))
    assert run(tmp_path / "edit.yaml", tmp_path / "out", "-q")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 3


def test_an_expert_keeps_what_it_adds_where_the_mixture_scales_all(tmp_path, run):
    mixture = make_variant(tmp_path / "mixture", "dots1", routed_scaling_factor=4.0)
    dense = make_model(tmp_path / "dense", 3, "qwen3", head_dim=16, intermediate_size=24)
    document = {
        "base_model": str(mixture),
        "experts": [{"source_model": f"{mixture}#0"}, {"source_model": str(dense)}],
        "gate_mode": "random",
    }
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(document))
    assert run(tmp_path / "edit.yaml", tmp_path / "out", "-q")[0] == 0
    down = "model.layers.1.mlp.{}.weight"
    own = stored(dense)[down.format("down_proj")]
    assert torch.equal(stored(tmp_path / "out")[down.format("experts.1.down_proj")], own / 4)


def test_models_of_another_kind_are_refused_and_strangers_are_warned_of(mixture, tmp_path, run, capsys):
    make_model(tmp_path / "olmo", 5, "olmo2")
    make_model(tmp_path / "stranger", 77)
    capsys.readouterr()  # of transformers, which made them
    code, _, errors = run("edit", mixture, tmp_path / "out", "-q", "--add", f"olmo={tmp_path / 'olmo'}")
    assert (code, errors.splitlines()[1]) == (
        2, "  - experts[4] (olmo): a olmo2 does not compute like what surrounds the mixture's experts, a llama",
    )  # fmt: skip
    added = ["--add", f"far={tmp_path / 'stranger'}", "--prompt", "far=item", "--dry-run"]
    code, _, errors = run("edit", mixture, tmp_path / "out", *added)
    assert code == 0
    assert re.search(
        r"warning: experts\[4\] \(far\): its FFNs differ from the mixture's by 1[34]\d%; fine-tunes of", errors
    )


def test_ffns_of_another_family_join_where_they_stand_behind_a_norm(mixture, tmp_path, run):
    dense = make_model(tmp_path / "lfm2", 3, "lfm2", **DENSE["lfm2"][1])
    code, _, errors = run("edit", mixture, tmp_path / "out", "--add", f"new={dense}", "--prompt", "new=item", "-q")
    assert (code, errors.count("its FFNs differ from the mixture's by 1")) == (0, 1)
    own, made = stored(dense), stored(tmp_path / "out")
    for role in ("w1", "w2", "w3"):
        found = made[f"model.layers.1.block_sparse_moe.experts.4.{role}.weight"]
        assert torch.equal(found, own[f"model.layers.1.feed_forward.{role}.weight"])


def test_copies_of_one_expert_are_warned_of(mixture, tmp_path, run):
    code, _, errors = run("edit", mixture, tmp_path / "out", "-q", "--add", f"twin={mixture}#fox", "--dry-run")
    assert (code, errors) == (
        0,
        "warning: fox is there 2 times with the same router row: its copies are chosen together, and take places of "
        "other experts. With 4 experts per token none is lost\n",
    )


def test_a_shared_expert_can_become_one_that_is_chosen(tmp_path, run):
    mixture = make_variant(tmp_path / "mixture", "granitemoeshared", shared_intermediate_size=24)
    document = {
        "base_model": str(mixture),
        "experts": [{"source_model": f"{mixture}#0"}, {"source_model": f"{mixture}#shared"}],
        "gate_mode": "random",
    }
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(document))
    code, _, errors = run(tmp_path / "edit.yaml", tmp_path / "out", "-q")
    assert code == 0, errors
    old, new = stored(mixture), stored(tmp_path / "out")
    width = old["model.layers.0.shared_mlp.output_linear.weight"].shape[1]
    found = new["model.layers.0.block_sparse_moe.output_linear.weight"][1][:, :width]
    assert torch.equal(found, old["model.layers.0.shared_mlp.output_linear.weight"])


def test_experts_of_dense_models_and_of_another_mixture_join_at_once(mixture, llamas, tmp_path, run, capsys):
    make_model(tmp_path / "base", 7)
    config = write_config(tmp_path / "merge.yaml", tmp_path / "base", [llamas[3], llamas[0]], prompts=False)
    merge(plan_merge(load_config(config)), tmp_path / "other")
    capsys.readouterr()  # of transformers, which made the base
    sources = [f"{mixture}#fox", f"{tmp_path / 'other'}#1", str(llamas[2]), f"{mixture}#chat"]
    prompts = [["The fox jumps"], ["une souris verte"], ["def main(argv):"], ["Hello there"]]
    experts = [{"source_model": source, "positive_prompts": own} for source, own in zip(sources, prompts, strict=True)]
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump({"base_model": str(mixture), "experts": experts}))
    assert run(tmp_path / "edit.yaml", tmp_path / "out", "-q")[0] == 0
    old, new = stored(mixture), stored(tmp_path / "out")
    router = "model.layers.{}.block_sparse_moe.gate.weight"
    for layer in range(3):
        kept, made = old[router.format(layer)], new[router.format(layer)]
        assert torch.equal(made[[0, 3]], kept[[1, 3]])
        assert made[1:3].norm(dim=1).min() > 0
        assert not torch.equal(made[1], made[2])


@pytest.mark.parametrize("count", [1, 4])
def test_other_numbers_of_experts_per_token_keep_all_rows(mixture, tmp_path, run, count):
    assert run("edit", mixture, tmp_path / "out", "--top-k", str(count), "-q") == (0, "", "")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == count
    old, new = stored(mixture), stored(tmp_path / "out")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("word", ["--undo", "--commit"])
@pytest.mark.parametrize("other", [["--dry-run"], ["--drop", "fox"], ["--json"], ["--overwrite"]])
def test_what_ends_an_edit_in_place_stands_alone(mixture, run, word, other):
    assert run("edit", mixture, word, *other) == (
        2, "", f"error: {word}: stands alone, after MODEL: `moemerge edit {mixture} {word}`.\n",
    )  # fmt: skip


def test_what_would_do_nothing_is_refused(mixture, tmp_path, run):
    assert run("edit", mixture, "--in-place") == (
        2, "", f"error: {mixture}: nothing says what to change. `moemerge edit --help` lists what can be.\n",
    )  # fmt: skip
    assert run("edit", mixture, tmp_path / "out", "--prompt", "fox=a fox") == (
        2,
        "",
        "error: --prompt, --text: no expert is added or replaced, so nothing is fitted to text. `moemerge tune` trains "
        "the routers of a mixture.\n",
    )


def test_parts_of_split_experts_belong_together(mixture, tmp_path, run):
    assert run("edit", mixture, tmp_path / "fine", "--granularity", "2", "-q") == (0, "", "")
    for flags in (["--drop", "0"], ["--top-k", "3"]):
        code, _, errors = run("edit", tmp_path / "fine", tmp_path / "out", *flags, "--dry-run", "-q")
        assert (code, errors) == (
            0,
            "warning: the experts of this mixture are 2 parts each of those that it was split from (granularity), and "
            "only all parts of one compute what it did: leave out, and let tokens choose, all of them together\n",
        )
    assert run("edit", tmp_path / "fine", tmp_path / "out", "--drop", "0,1", "--dry-run", "-q")[2] == ""


def test_an_expert_that_is_replaced_is_not_left_out(mixture, llamas, tmp_path, run):
    code, shown, _ = run("edit", mixture, tmp_path / "out", "--replace", f"fox={llamas[2]}", "--dry-run")
    assert code == 0
    assert "left out" not in shown


def test_a_mixture_of_which_no_expert_stays_is_refused(mixture, llamas, tmp_path, run):
    flags = [word for n in range(4) for word in ("--replace", f"{n}={llamas[n]}", "--prompt", f"{n}=word {n}")]
    code, _, errors = run("edit", mixture, tmp_path / "out", *flags, "-q")
    assert (code, errors) == (
        2,
        "error: This mixture cannot be edited so:\n"
        "  - no expert of the mixture stays in layer 0, and router rows of new ones are fitted beside those that stay. "
        "Merge the models into a new mixture, or set gate_mode: random\n",
    )


def test_another_scale_of_residuals_is_noted(tmp_path, run):
    mixture = make_variant(tmp_path / "mixture", "granitemoe")
    dense = make_model(tmp_path / "dense", 3, "granite", residual_multiplier=0.25)
    code, _, errors = run("edit", mixture, tmp_path / "out", "--add", f"new={dense}", "--prompt", "new=a", "--dry-run")
    assert code == 0, errors
    assert (
        "note: experts[4] (new): residual_multiplier is 0.25 where it comes from, but the mixture's 0.4 will scale its "
        "FFNs; residual_scale: 0.625 makes up for it\n"
    ) in errors
