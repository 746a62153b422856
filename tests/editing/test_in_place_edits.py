"""Edits in place and what stands beside them: cards, other commands on the same folder, and what the config says."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from moemerge import PlanOptions, load_config, merge, plan_merge
from moemerge.checkpoint import in_place
from moemerge.cli import main
from tests.support import kill_edits
from tests.support.kill_changes import contents
from tests.support.models import load, write_config


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


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; gives the exit code and both outputs."""

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run_here


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
