"""Edits in place and what stands beside them: cards, other commands on the same folder, and what the config says."""

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from moemerge import EvaluationSettings, PlanOptions, evaluate, load_config, merge, plan_merge
from moemerge.checkpoint import in_place
from moemerge.evaluation.figures import MERGED
from tests.support import kill_edits
from tests.support.kill_changes import contents
from tests.support.models import TEXT, load, make_model, write_config
from tests.support.vocabularies import with_tokens


@pytest.fixture(scope="module")
def mixture(llamas, tmp_path_factory) -> Path:
    """A mixture of four experts with random routers in several shards, called base, fox, code and chat."""
    root = tmp_path_factory.mktemp("mixture")
    config = write_config(root / "merge.yaml", llamas[0], llamas, prompts=False)
    merge(plan_merge(load_config(config), PlanOptions(max_shard_bytes=100_000)), root / "mixture")
    return root / "mixture"


@pytest.fixture
def model(mixture, tmp_path) -> Path:
    return shutil.copytree(mixture, tmp_path / "home" / "model")


def kept(model: Path) -> tuple[str, dict[str, str]]:
    """The base and the experts that the config in a folder names."""
    config = load_config(model / "moemerge_config.yaml", allow_identical_experts=True)
    return config.base_model, dict(zip(config.expert_names, (e.source_model for e in config.experts), strict=True))


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_is_not_merged_in_place(model, tmp_path, run):
    adapter = tmp_path / "adapter"
    get_peft_model(load(model), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    before = contents(model)
    assert run("edit", f"{model}+{adapter}", "--in-place", "--drop", "fox", "-q") == (
        2,
        "",
        f"error: {model}+{adapter}: an adapter changes weights all over the mixture, so it is not merged in place. "
        "Write to another folder.\n",
    )
    assert contents(model.parent) == {f"model/{name}": held for name, held in before.items()}
    assert run("edit", f"{model}+{adapter}", tmp_path / "out", "--drop", "fox", "-q") == (0, "", "")


@pytest.mark.parametrize("command", ["edit", "merge", "extract"])
def test_a_model_whose_edit_can_be_undone_is_not_replaced(mixture, model, tmp_path, run, command):
    sources = [Path(name) for name in kept(mixture)[1].values()]
    config = write_config(tmp_path / "merge.yaml", sources[0], sources[1:], prompts=False)
    words = {
        "edit": ("edit", mixture, model, "--drop", "chat"),
        "merge": (config, model),
        "extract": ("extract", f"{mixture}#chat", model),
    }[command]
    assert run("edit", model, "--in-place", "--drop", "fox", "-q") == (0, "", "")
    before = contents(model.parent)
    assert run(*words, "--overwrite", "-q") == (
        2,
        "",
        f"error: {model}: its last edit in place can still be undone, which could not be once it is replaced. Make it "
        f"final with `moemerge edit {model} --commit`, or go back with --undo, and replace it then.\n",
    )
    assert contents(model.parent) == before
    assert run("edit", model, "--commit", "-q") == (0, "", "")
    assert run(*words, "--overwrite", "-q")[0] == 0


CARD = "---\nlanguage: [de, fr]\nlicense: mit\n---\n\n# Ours\n\nEdited with moemerge, by hand.\n"


def test_a_card_that_moemerge_did_not_write_stays(model, run):
    (model / "README.md").write_text(CARD)
    note = "README.md: was not written by moemerge, so it stays as it is; what it says of the experts may change"
    code, shown, errors = run("edit", model, "--in-place", "--drop", "fox", "--dry-run", "--json")
    assert (code, json.loads(shown)["notes"][-1]) == (0, note)
    assert errors.splitlines()[-1] == f"note: {note}"
    assert run("edit", model, "--in-place", "--drop", "fox")[2].splitlines().count(f"note: {note}") == 1
    assert (model / "README.md").read_text() == CARD
    assert run("edit", model, "--commit", "-q") == (0, "", "")
    assert (model / "README.md").read_text() == CARD
    assert len(load_config(model / "moemerge_config.yaml").experts) == 3


def test_a_card_of_a_merge_or_an_edit_is_written_anew(model, run):
    for expert, said in (("fox", "of 3 experts"), ("code", "of 2 experts")):
        code, _, errors = run("edit", model, "--in-place", "--drop", expert)
        assert (code, [line for line in errors.splitlines() if "README" in line]) == (0, [])
        assert said in (model / "README.md").read_text()
        assert run("edit", model, "--commit", "-q") == (0, "", "")


def test_experts_of_dense_models_are_known_after_an_edit_in_place_and_verified(model, llamas, run):
    flags = ("--drop", "fox", "--add", f"more={llamas[1]}", "--order", "more,chat,base,code")
    assert run("edit", model, "--in-place", *flags, "-q")[0] == 0
    base, experts = kept(model)
    assert Path(base).samefile(llamas[0])
    assert [*experts] == ["more", "chat", "base", "code"]
    for source, number in zip(experts.values(), (1, 3, 0, 2), strict=True):
        assert Path(source).samefile(llamas[number])
    code, shown, errors = run("verify", model)
    assert (code, errors.splitlines()[-1]) == (
        0,
        "note: README.md: was written by an edit in place, and is not compared",
    )
    assert "as planned" in shown


def test_without_its_widest_expert_a_mixture_is_not_called_a_merge_of_narrower_ones(llamas, tmp_path, run):
    wide, model = make_model(tmp_path / "wide", 9, intermediate_size=64), tmp_path / "model"
    config = write_config(tmp_path / "merge.yaml", llamas[0], [llamas[1], wide, llamas[2]], prompts=False)
    merge(plan_merge(load_config(config)), model)
    assert run("edit", model, "--in-place", "--drop", "wide", "-q")[0] == 0
    assert Path(kept(model)[0]).samefile(model)


def test_without_what_it_was_made_from_a_mixture_names_itself_for_all_experts(model, llamas, run):
    (model / "moemerge_config.yaml").unlink()
    flags = ("--drop", "0", "--rename", "3=chat", "--replace", f"1={llamas[1]}", "--prompt", "1=The quick brown fox")
    assert run("edit", model, "--in-place", *flags, "-q")[0] == 0
    for names in (["fox", f"{model.name}-2", "chat"], ["fox", "two", "chat"]):
        base, experts = kept(model)
        assert Path(base).samefile(model)
        assert [*experts] == names
        for name, source in experts.items():
            folder, _, expert = source.rpartition("#")
            assert (Path(folder).resolve(), expert) == (model.resolve(), name)
        described = load_config(model / "moemerge_config.yaml").experts
        assert [expert.positive_prompts for expert in described] == [["The quick brown fox"], [], []]
        assert run("verify", model, "-q") == (
            2,
            "",
            f"error: {model}: was edited in place, so there is nothing left that it could be compared with. `moemerge "
            f"inspect {model} --values` says whether its files agree, and reads every number.\n",
        )
        assert run("inspect", model, "--values")[0] == 0
        assert run("edit", model, "--commit", "-q") == (0, "", "")
        if "two" not in names:
            assert run("edit", model, "--in-place", "--rename", "1=two", "-q") == (0, "", "")


@pytest.mark.parametrize("changed", ["shared weights", "noise", "tokens"])
def test_what_all_experts_have_changed_cannot_be_made_without_one(llamas, tmp_path, run, changed):
    """A mean over three experts is another than that over four, which the mixture has."""
    keys = {"shared_weights": "average"} if changed == "shared weights" else {}
    models = llamas
    if changed == "tokens":
        models, keys = [*llamas[:3], with_tokens(llamas[3], tmp_path / "chat")], {"tokenizer": "union"}
    config = write_config(tmp_path / "merge.yaml", llamas[0], models, prompts=False, **keys)
    if changed == "noise":
        config.write_text(config.read_text().replace("- source_model", "- noise_scale: 0.01\n  source_model"))
    model = tmp_path / "model"
    assert run(config, model, "-q")[0] == 0
    assert run("edit", model, "--in-place", "--top-k", "1", "-q") == (0, "", "")
    assert Path(kept(model)[0]).samefile(llamas[0])
    assert run("verify", model, "-q")[0] == 0
    assert run("edit", model, "--commit", "-q") == (0, "", "")
    assert run("edit", model, "--in-place", "--drop", "fox", "-q") == (0, "", "")
    assert {Path(name.partition("#")[0]).resolve() for name in kept(model)[1].values()} == {model.resolve()}
    assert run("verify", model, "-q")[0] == 2


def test_an_evaluation_does_not_compare_a_mixture_with_itself(model, llamas, tmp_path, run):
    (model / "moemerge_config.yaml").unlink()
    assert run("edit", model, "--in-place", "--drop", "0", "-q")[0] == 0
    (tmp_path / "text.txt").write_text(TEXT)
    settings = EvaluationSettings(compute_dtype="float32", kept_losses=tmp_path / "kept")
    found = evaluate(model, {"text": [str(tmp_path / "text.txt")]}, settings)
    assert found.losses.keys() == {MERGED, *(f"expert {model.name}-{number}" for number in (1, 2, 3))}
    assert f"{model} was edited in place: what it was before is left out" in found.notes


def cut_off(model: Path, monkeypatch, *words: str) -> None:
    """Run `moemerge edit` in a process of its own that is gone before the third file is moved."""
    moved = []

    def move(source: Path, target: Path) -> None:
        if len(moved) == 2:
            os._exit(9)
        moved.append(source)
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "_move", move)
        assert kill_edits.command(model, *words) == 9


@pytest.mark.parametrize("command", ["inspect MODEL", "eval MODEL --data a=merge.yaml", "edit MODEL OUT --top-k 1"])
def test_every_command_says_how_a_change_that_was_cut_off_is_ended(model, tmp_path, run, monkeypatch, command):
    words = command.replace("MODEL", str(model)).replace("OUT", str(tmp_path / "out")).split()
    before = contents(model)
    cut_off(model, monkeypatch, "--in-place", "--drop", "fox")
    assert run(*words) == (
        1,
        "",
        f"error: {model}: an edit of it in place was interrupted while files were moved. `moemerge edit {model} "
        "--undo` brings back what it was before; --commit in place of that ends the edit.\n",
    )
    assert run("edit", model, "--commit", "-q") == (0, "", "")
    assert len(load_config(model / "moemerge_config.yaml").experts) == 3
    assert contents(model.parent) == {f"model/{name}": held for name, held in contents(model).items()}

    after = contents(model)
    assert after.keys() != before.keys()
    assert run("edit", model, "--in-place", "--drop", "chat", "-q") == (0, "", "")
    cut_off(model, monkeypatch, "--undo")
    assert run(*words) == (
        1,
        "",
        f"error: {model}: going back before an edit of it in place was interrupted while files were moved. `moemerge "
        f"edit {model} --undo` ends that.\n",
    )
    assert run("edit", model, "--undo", "-q") == (0, "", "")
    assert contents(model.parent) == {f"model/{name}": held for name, held in after.items()}
