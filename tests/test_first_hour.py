"""The first hour of a user: three commands from the names of models to a mixture that speaks, and what they leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
REAL_MODELS = Path(os.environ.get("MOEMERGE_REAL_MODELS", ROOT / ".cache" / "models"))


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run moemerge in an empty folder that is a user's home, with nothing of this machine's settings but the path."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "moemerge", *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done


def speak(home: Path, models: Path, experts: list[str]) -> str:
    """Go from the names of models to an answer; returns the answer."""
    (home / "models").symlink_to(models)
    begun = run(home, "init", "models/base", *(f"models/{name}" for name in experts), "-o", "merge.yaml")
    assert "moemerge merge.yaml" in begun.stdout + begun.stderr
    config = yaml.safe_load((home / "merge.yaml").read_text())
    assert [expert["source_model"] for expert in config["experts"]] == [f"models/{name}" for name in experts]
    merged = run(home, "merge.yaml", "out")
    assert "\nout: done, " in f"\n{merged.stdout}"
    said = run(home, "generate", "out", "The capital of France is", "--max-new-tokens", "8", "--raw")
    assert sorted(path.name for path in home.iterdir() if not path.name.startswith(".")) == [
        "merge.yaml",
        "models",
        "moemerge.schema.json",
        "out",
    ]
    return said.stdout


def test_three_commands_lead_to_a_mixture_that_speaks(tmp_path, llamas):
    assert speak(tmp_path, llamas[0].parent, ["fox", "code"])
    text = tmp_path / "fox.txt"
    text.write_text("\n<|document|>\n".join(["The quick brown fox jumps over the lazy dog."] * 5))
    judged = run(tmp_path, "eval", "out", "--data", "fox=fox.txt", "--baselines").stdout
    assert judged.startswith("merged ")
    assert "expert fox" in judged


@pytest.mark.skipif(not (REAL_MODELS / "base" / "config.json").exists(), reason=f"no real models in {REAL_MODELS}")
def test_real_models_know_what_they_say(tmp_path):
    assert "Paris" in speak(tmp_path, REAL_MODELS, ["code", "french", "math", "prose"])
