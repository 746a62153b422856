"""Router inputs that are kept from one merge to the next."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moemerge import MergeOptions, PlanOptions, load_config, merge, plan_merge
from moemerge.cli import main
from moemerge.errors import RefusedError, RouterError
from moemerge.routers import kept_states
from moemerge.routers.initialisation import init_routers
from moemerge.routers.kept_folder import without_old_drafts
from moemerge.routers.request import PassOptions
from tests.support.models import make_model

PROMPTS = (["The quick fox", "A lazy dog"], ["def main(): pass", "return x + 1"], ["Le chat dort", "la nuit tombe"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    return [str(make_model(root / "base", 0)), *(str(make_model(root / f"e{n}", n, tuned_from=0)) for n in (1, 2, 3))]


def made(models, folder=None, *, experts=(0, 1, 2), each=None, **keys):
    described = [
        {"source_model": models[1 + place], "positive_prompts": PROMPTS[place], **(each or {})} for place in experts
    ]
    plan = plan_merge(load_config({"base_model": models[0], "experts": described, **keys}))
    return init_routers(plan.router_request, PassOptions(kept_states=folder), seed=0, progress=lambda *_: None)


def rows(models, folder=None, **keys):
    found = made(models, folder, **keys).rows.values()
    return torch.stack([torch.frombuffer(bytearray(data), dtype=torch.float32) for data in found])


@pytest.mark.parametrize("mode", ["auto", "ridge", "hidden", "delta"])
def test_one_more_expert_gives_the_rows_of_a_merge_of_all(models, tmp_path, mode):
    settings = {"gate_mode": mode, "dtype": "float32"}
    whole = rows(models, **settings)
    assert torch.allclose(
        rows(models, tmp_path, experts=(0, 1), **settings), rows(models, experts=(0, 1), **settings), atol=1e-5
    )
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert torch.allclose(rows(models, tmp_path, **settings), whole, atol=1e-5)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(after) > len(before) or mode == "delta"
    assert before.items() <= after.items()


def test_kept_states_are_read_and_the_base_is_not_run_again(models, tmp_path):
    first = rows(models, tmp_path, gate_mode="ridge", dtype="float32")
    for path in tmp_path.iterdir():
        save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    assert torch.allclose(rows(models, tmp_path, gate_mode="ridge", dtype="float32"), first / 2, rtol=1e-3, atol=1e-4)


def test_the_report_counts_the_texts_that_were_kept(models, tmp_path):
    settings = {"gate_mode": "ridge"}
    assert made(models, tmp_path, experts=(0, 1), **settings).report.kept_texts == (0, 2)
    assert made(models, tmp_path, **settings).report.kept_texts == (2, 3)
    assert made(models, tmp_path, **settings).report.kept_texts == (3, 3)
    assert made(models, **settings).report.kept_texts is None


def draft(folder, digit):
    folder.mkdir(exist_ok=True)
    path = folder / f".{digit * 32}.safetensors.1"
    path.write_bytes(b"half")
    return path


def test_drafts_of_killed_merges_are_removed(models, tmp_path):
    draft(tmp_path, "a")
    rows(models, tmp_path, gate_mode="ridge")
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    assert len(list(tmp_path.iterdir())) == len(PROMPTS)


def test_drafts_stay_while_another_merge_is_writing(models, tmp_path):
    theirs = draft(tmp_path, "a")
    with without_old_drafts(tmp_path):
        theirs = draft(tmp_path, "a")
        rows(models, tmp_path, gate_mode="ridge")
        assert theirs.exists()
    with without_old_drafts(tmp_path):
        assert not theirs.exists()
    assert len(list(tmp_path.iterdir())) == len(PROMPTS)


def test_a_draft_that_another_merge_removed_costs_only_what_would_be_kept(models, tmp_path, monkeypatch):
    given = kept_states.capture_router_inputs

    def removing(request):
        yield from given(request)
        for path in tmp_path.glob(".*.safetensors.*"):
            path.unlink()

    monkeypatch.setattr(kept_states, "capture_router_inputs", removing)
    found = rows(models, tmp_path, gate_mode="ridge", dtype="float32")
    assert torch.allclose(found, rows(models, gate_mode="ridge", dtype="float32"), atol=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_another_base_has_other_files(models, tmp_path):
    rows(models, tmp_path / "kept", gate_mode="ridge")
    rows([str(make_model(tmp_path / "other", 7)), *models[1:]], tmp_path / "kept", gate_mode="ridge")
    assert len(list((tmp_path / "kept").iterdir())) == 2 * len(PROMPTS)


def test_a_file_is_for_one_expert_whatever_its_number(models, tmp_path):
    rows(models, tmp_path, gate_mode="ridge")
    rows(models, tmp_path, experts=(2, 0), gate_mode="ridge")
    assert len(list(tmp_path.iterdir())) == len(PROMPTS)


def test_experts_with_equal_text_share_a_file(models, tmp_path):
    settings = {"each": {"negative_prompts": ["Once upon a time"]}, "gate_mode": "ridge", "dtype": "float32"}
    made = rows(models, tmp_path, **settings)
    assert len(list(tmp_path.iterdir())) == len(PROMPTS) + 1
    assert torch.allclose(made, rows(models, **settings), atol=1e-5)
    assert torch.allclose(rows(models, tmp_path, **settings), made, atol=1e-5)


UNUSED = {
    "mergekit_hidden": "--keep-states: gate_mode mergekit_hidden reads other states than those that are kept. Leave the "
    "option out, or choose another gate_mode.",
    "random": "--keep-states: gate_mode random does not run the base model, so there are no router inputs to keep. Leave "
    "the option out, or choose another gate_mode.",
}


@pytest.mark.parametrize("mode", UNUSED)
def test_a_method_without_states_to_keep_is_refused(models, tmp_path, mode):
    described = [{"source_model": models[1 + n], "positive_prompts": PROMPTS[n]} for n in range(2)]
    plan = plan_merge(load_config({"base_model": models[0], "experts": described, "gate_mode": mode}))
    with pytest.raises(RefusedError) as refused:
        merge(plan, tmp_path / "out", MergeOptions(kept_states=tmp_path / "kept"))
    assert str(refused.value) == UNUSED[mode]
    assert list(tmp_path.iterdir()) == []


def test_a_routing_table_keeps_states_for_any_method(models, tmp_path):
    described = [{"source_model": models[1 + n], "positive_prompts": PROMPTS[n]} for n in range(2)]
    config = load_config({"base_model": models[0], "experts": described, "gate_mode": "random"})
    plan = plan_merge(config, PlanOptions(routing_table=True))
    assert merge(plan, tmp_path / "out", MergeOptions(kept_states=tmp_path / "kept")).kept_texts == (0, 2)


def test_a_damaged_file_is_made_again(models, tmp_path):
    first = rows(models, tmp_path, dtype="float32")
    damaged = min(tmp_path.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert torch.allclose(rows(models, tmp_path, dtype="float32"), first, atol=1e-5)
    assert load_file(damaged)


def test_a_folder_that_cannot_be_written_is_named(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RouterError, match="--keep-states: .*file.* cannot be written"):
        rows(models, tmp_path / "file")


@pytest.mark.parametrize("kind", ["file", "model", "out", "new"])
def test_the_command_refuses_a_folder_that_holds_other_files(models, tmp_path, monkeypatch, capsys, kind):
    config = tmp_path / "merge.yaml"
    config.write_text(
        f"base_model: {models[0]}\nexperts: [{{source_model: {models[1]}}}, {{source_model: {models[2]}}}]\n"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    folder = {"file": config, "model": models[0], "out": tmp_path / "out"}.get(kind, tmp_path / "new")
    monkeypatch.setattr(sys, "argv", ["moemerge", str(config), str(tmp_path / "new"), "--keep-states", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--keep-states: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_keeps_states(models, tmp_path, monkeypatch, capsys):
    config = tmp_path / "merge.yaml"
    config.write_text(
        f"base_model: {models[0]}\nexperts:\n"
        + "".join(f"  - {{source_model: {models[1 + n]}, positive_prompts: ['{PROMPTS[n][0]}']}}\n" for n in range(2))
    )
    kept = tmp_path / "states"
    monkeypatch.setattr(sys, "argv", ["moemerge", str(config), str(tmp_path / "out"), "--keep-states", str(kept)])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert all(path.suffix == ".safetensors" for path in kept.iterdir())
    assert list(kept.iterdir())
    assert (
        f"\nkept states: 0 of 3 groups of text were read from {kept}, 3 are new there. An expert's positive text is a "
        "group, its negative text another, and text for no expert, such as router.calibration_texts or moemerge's own "
        "sample, one more\n"
    ) in capsys.readouterr().err
