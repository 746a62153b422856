"""Text that several devices share: what each command finds is what one device finds."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml

from moemerge import merge, plan_merge
from moemerge.config.loading import load_config
from moemerge.config.schema import CONFIG_COPY
from moemerge.evaluation import choices, text_pass
from moemerge.routers import streamed_pass
from tests.support.models import load_weights, save_weights, write_config
from tests.support.recipes import documents

ONE = ("--device=cpu", "--compute-dtype=float32", "-q")
SEVERAL = [("--devices=cpu,cpu", *ONE[1:]), ("--device", "cpu,cpu,cpu", *ONE[1:])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llamas) -> Path:
    """A folder with a config, and text of more batches than there are devices."""
    root = tmp_path_factory.mktemp("devices")
    for seed, name in enumerate(("fox", "code")):
        (root / f"{name}.txt").write_text(documents(seed, 40))
    write_config(root / "c.yaml", llamas[0], llamas[1:], prompts=False)
    return root


@pytest.fixture(scope="module")
def out(folder) -> Path:
    """A mixture that does not say what it was made of, so that it is run alone."""
    merge(plan_merge(load_config(folder / "c.yaml")), folder / "out")
    (folder / "out" / CONFIG_COPY).unlink()
    return folder / "out"


@pytest.fixture
def threads(monkeypatch) -> list[int]:
    """The threads that pass batches through layers."""
    seen: list[int] = []
    for module in (choices, text_pass, streamed_pass):
        run_layer = module.run_layer

        def noted(*given, run_layer=run_layer):
            seen.append(threading.get_ident())
            run_layer(*given)

        monkeypatch.setattr(module, "run_layer", noted)
    return seen


def found(run, *words: object) -> str:
    code, shown, errors = run(*words)
    assert (code, [line for line in errors.splitlines() if "does not say" not in line]) == (0, [])
    return shown


@pytest.mark.parametrize("command", ["eval", "routes", "analyze", "prune"])
def test_several_devices_find_what_one_finds(run, out, threads, tmp_path, command):
    folder = out.parent
    data = [f"--data={name}={folder / name}.txt" for name in ("fox", "code")]
    words = {
        "eval": (out, *data, "--json"),
        "routes": (out, "--file", folder / "fox.txt", "--json"),
        "analyze": (out, *data, "--json"),
        "prune": (out, tmp_path / "pruned", *data, "--keep=2", "--dry-run", "--json"),
    }[command]
    alone = json.loads(found(run, command, *words, *ONE))
    assert set(threads) == {threading.get_ident()}
    for several in SEVERAL:
        threads.clear()
        assert json.loads(found(run, command, *words, *several)) == alone
        assert threading.get_ident() not in threads


@pytest.mark.parametrize("method", ["hidden", "combined"])
def test_routers_made_on_several_devices_are_those_of_one(run, folder, threads, tmp_path, method):
    document = yaml.safe_load((folder / "c.yaml").read_text())
    for expert, name in zip(document["experts"], ("fox", "code", "fox"), strict=True):
        expert["positive_texts"] = f"{folder / name}.txt"
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**document, "gate_mode": method, "router": {"tokens_per_expert": 1000}}))
    made = run(config, tmp_path / "alone", *ONE)
    assert made[0] == 0
    assert set(threads) == {threading.get_ident()}
    alone = load_weights(tmp_path / "alone")
    for several in SEVERAL:
        threads.clear()
        assert run(config, tmp_path / "shared", "--overwrite", *several) == made
        assert threading.get_ident() not in threads
        shared = load_weights(tmp_path / "shared")
        assert shared.keys() == alone.keys()
        assert all(torch.equal(values, alone[name]) for name, values in shared.items())


def test_what_is_not_finite_on_one_of_several_devices_is_said_as_on_one(run, out, tmp_path):
    shutil.copytree(out, tmp_path / "broken")
    tensors = load_weights(tmp_path / "broken")
    next(values for name, values in tensors.items() if "layers.1" in name and "o_proj" in name)[3, 2] = torch.nan
    save_weights(tmp_path / "broken", tensors)
    words = ("eval", tmp_path / "broken", f"--data=fox={out.parent / 'fox.txt'}")
    alone = run(*words, *ONE)
    assert (alone[0], "from layer 1 on" in alone[2]) == (1, True)
    assert run(*words, *SEVERAL[0]) == alone


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("eval", "--devices=cpu,gpu"),
            "error: device 'gpu' cannot be used here: it is not one of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps. Choose ",
        ),
        (
            ("merge", "--devices=mps:0,mps:1"),
            "error: --device: 'mps:1' is not one of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps.",
        ),
        (
            ("merge", "--devices=cpu,gpu"),
            "error: --device: 'gpu' is not one of auto, cpu, cuda, cuda:N, xpu, xpu:N, mps.",
        ),
        (
            ("generate", "--device=cpu,cpu"),
            "error: Invalid value for '--device': 'cpu,cpu': this command runs on one device.",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused(run, out, tmp_path, words, said):
    folder, (command, option) = out.parent, words
    rest = {
        "eval": (out, f"--data=fox={folder / 'fox.txt'}"),
        "merge": (folder / "c.yaml", tmp_path / "out"),
        "generate": (out, "Hello"),
    }[command]
    code, shown, errors = run(command, *rest, option, "-q")
    assert (code, shown) == (2, "")
    assert " ".join(errors.split()).startswith(said)
