"""Losses that are kept: found by what they depend on, and by nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from moemerge import EvaluationSettings, evaluate, load_config, merge, plan_merge
from moemerge.cli import main
from moemerge.errors import SourceError
from moemerge.evaluation import processes
from moemerge.evaluation.baselines import average
from moemerge.evaluation.evaluator import compare
from moemerge.evaluation.kept_losses import KeptLosses, default_folder
from moemerge.evaluation.runnable import open_dense
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from tests.support.models import edit_json

TEXTS = {"fox": "The quick fox jumps over the lazy dog. " * 6, "code": "def main(argv): return argv[0] + 1. " * 6}


@pytest.fixture
def made(tmp_path, llamas):
    """Two merged models, of other k, and texts."""
    document = {"base_model": str(llamas[0]), "experts": [{"source_model": str(llama)} for llama in llamas[1:3]]}
    for name, top in (("one", 1), ("two", 2)):
        merge(plan_merge(load_config(document | {"experts_per_token": top})), tmp_path / name)
    data = {}
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text("\n<|document|>\n".join([text] * 5))
        data[name] = [str(tmp_path / f"{name}.txt")]
    return tmp_path / "one", tmp_path / "two", data


@pytest.fixture
def ran(monkeypatch):
    """Names of the models that are run, in their order."""
    names = []
    run = processes.run_model

    def noted(model, *arguments, **keys):
        names.append(model.name)
        return run(model, *arguments, **keys)

    monkeypatch.setattr(processes, "run_model", noted)
    return names


def test_dense_models_are_run_once_for_several_mixtures(made, ran, tmp_path):
    one, two, data = made
    settings = EvaluationSettings(baselines=True, kept_losses=tmp_path / "kept")
    found, (difference,) = compare([one, two], data, settings)
    assert ran[:5] == [str(one), "base", *(f"expert {name}" for name in found[0].experts), "uniform mixture"]
    assert [name for name in ran if name == "base"] == ["base"]
    assert [name for name in ran if name == "weight average"] == ["weight average"]
    fresh = evaluate(two, data, EvaluationSettings(baselines=True))
    assert fresh.losses["base"] == found[1].losses["base"]
    assert fresh.losses["weight average"] == found[1].losses["weight average"]
    gap = found[1].mean_losses["merged"] - found[0].mean_losses["merged"]
    assert difference.value == pytest.approx(gap, abs=1e-9)


def test_an_evaluation_holds_the_difference_to_each_other_model(made):
    one, _, data = made
    found = evaluate(one, data, EvaluationSettings(baselines=True))
    assert list(found.differences) == [model for model in found.mean_losses if model != "merged"]
    for model, gap in found.differences.items():
        assert gap.value == pytest.approx(found.mean_losses["merged"] - found.mean_losses[model], abs=1e-9)
        assert gap.low == pytest.approx(gap.high) == pytest.approx(gap.value)  # five times the same document


def test_a_missing_model_is_refused_before_any_is_run(made, ran, tmp_path):
    one, _, data = made
    with pytest.raises(SourceError, match="there is no such folder"):
        compare([one, tmp_path / "nowhere"], data)
    assert ran == []


def test_json_compares_models_too(made, monkeypatch, capsys):
    one, two, data = made
    words = [
        "moemerge",
        "eval",
        str(one),
        str(two),
        "--json",
        *(f"--data={name}={path}" for name, (path,) in data.items()),
    ]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        main()
    first, second = json.loads(capsys.readouterr().out)
    gap = second["mean_losses"]["merged"] - first["mean_losses"]["merged"]
    assert first["against_first"] is None
    assert second["against_first"]["value"] == pytest.approx(gap, abs=1e-9)
    assert second["verdict"].startswith("merged ")


def test_new_text_is_run_by_itself(made, ran, tmp_path):
    one, _, data = made
    settings = EvaluationSettings(kept_losses=tmp_path / "kept")
    evaluate(one, {"fox": data["fox"]}, settings)
    first = len(list((tmp_path / "kept").iterdir()))
    evaluate(one, data, settings)
    assert (first, len(list((tmp_path / "kept").iterdir()))) == (3, 6)  # base and two experts


def test_a_rerun_replaces_what_is_kept(made, ran, tmp_path):
    one, _, data = made
    settings = EvaluationSettings(kept_losses=tmp_path / "kept")
    before = evaluate(one, data, settings)
    for path in (tmp_path / "kept").iterdir():
        path.write_text(json.dumps([100.0] * len(json.loads(path.read_text()))))
    assert evaluate(one, data, settings).losses["base"]["fox"].value != before.losses["base"]["fox"].value
    first = len(ran)
    assert evaluate(one, data, replace(settings, rerun=True)).losses == before.losses
    assert ran[first:] == ran[:4]  # the mixture, base and two experts
    assert evaluate(one, data, settings).losses == before.losses


def test_a_changed_model_is_run_again(llamas, tmp_path):
    kept = KeptLosses(tmp_path / "kept", Compute(torch.device("cpu"), torch.float32))
    windows = [Window(0, (1, 2, 3), (True, True, True))]
    copied = shutil.copytree(llamas[0], tmp_path / "base")
    model = open_dense(str(copied), "base", lambda _: None)
    kept.keep(model, windows, torch.tensor([1.5]))
    assert kept.find(model, windows).tolist() == [1.5]
    assert kept.find(model, [Window(0, (1, 2, 4), (True, True, True))]) is None
    assert kept.find(average("mean", [model, model]), windows) is None
    assert KeptLosses(tmp_path / "kept", Compute(torch.device("cpu"), torch.bfloat16)).find(model, windows) is None
    assert KeptLosses(None, Compute(torch.device("cpu"), torch.float32)).find(model, windows) is None
    edit_json(copied / "config.json", rms_norm_eps=0.125)
    assert kept.find(open_dense(str(copied), "base", lambda _: None), windows) is None


@pytest.mark.parametrize("held", ["", "{}", "[1.0, 2.0]", "[NaN]", '["x"]'])
def test_a_damaged_file_counts_as_none(llamas, tmp_path, held):
    kept = KeptLosses(tmp_path, Compute(torch.device("cpu"), torch.float32))
    windows = [Window(0, (1, 2), (True, True))]
    model = open_dense(str(llamas[0]), "base", lambda _: None)
    kept.keep(model, windows, torch.tensor([1.0]))
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == [1.0]
    path.write_text(held)
    assert kept.find(model, windows) is None


def test_a_folder_that_takes_nothing_is_no_error(llamas, tmp_path):
    (tmp_path / "file").write_text("")
    kept = KeptLosses(tmp_path / "file", Compute(torch.device("cpu"), torch.float32))
    kept.keep(
        open_dense(str(llamas[0]), "base", lambda _: None), [Window(0, (1, 2), (True, True))], torch.tensor([1.0])
    )


def test_losses_are_kept_in_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "moemerge" / "losses"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "moemerge" / "losses"


def test_a_user_without_a_home_keeps_none(monkeypatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a uid that has no entry
    assert default_folder() is None
