"""Edits that are killed or interrupted: the old model or the new one, and nothing that a reader takes for a mix."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint import in_place
from moemerge.errors import SourceError
from moemerge.sources.model_folder import open_model
from tests.support import kill_edits
from tests.support.kill_changes import contents
from tests.support.models import load, logits, write_config

ROOT = Path(__file__).parents[2]
# The command, with a disk that takes a while for each tensor.
SLOW = """
import time
from moemerge.checkpoint import writer
write = writer._write_band
writer._write_band = lambda *args, **keys: (time.sleep(0.05), write(*args, **keys))
from moemerge.cli import main
main()
"""


@pytest.fixture(scope="module")
def mixture(llamas, tmp_path_factory) -> Path:
    """A mixture of four experts with random routers, called base, fox, code and chat."""
    root = tmp_path_factory.mktemp("mixture")
    config = write_config(root / "merge.yaml", llamas[0], llamas, prompts=False)
    merge(plan_merge(load_config(config)), root / "mixture")
    return root / "mixture"


@pytest.fixture
def model(mixture, tmp_path) -> Path:
    return shutil.copytree(mixture, tmp_path / "home" / "model")


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_at_random_moments(mixture, tmp_path, kills):
    words = [sys.executable, "-m", "tests.support.kill_edits", mixture, tmp_path / "kills", str(kills)]
    done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert sum(counts.values()) == kills
    assert counts["old"] > 0


def test_while_files_are_moved_no_reader_finds_a_model(model, monkeypatch):
    old = logits(load(model))
    moves = []

    def stop(source: Path, target: Path) -> None:
        if len(moves) == 3:
            os._exit(9)
        moves.append(source)
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "_move", stop)
        assert kill_edits.command(model, *kill_edits.IN_PLACE) == 9
    assert "config.json" not in contents(model)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(SourceError) as refused:
        open_model(str(model), lambda _: None)
    assert str(refused.value) == (
        f"{model}: an edit of it in place was interrupted while files were moved. `moemerge edit {model} --undo` "
        "brings back what it was before; --commit in place of that ends the edit."
    )
    assert kill_edits.command(model, "--undo") == 0
    assert torch.equal(logits(load(model)), old)


@pytest.mark.parametrize("inside", [False, True])
def test_an_interrupt_in_the_middle_leaves_what_was_there(model, tmp_path, inside):
    before, out = contents(model), tmp_path / "home" / "out"
    words = ["edit", str(model), *(["--in-place"] if inside else [str(out)]), "--drop", "base", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stage = tmp_path / "home" / (".model.moemerge-undo/new" if inside else ".out.moemerge-partial")
    while not list(stage.glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted: the output is as it was before\n")
    assert process.returncode == 130
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["model"]
    assert contents(model) == before
