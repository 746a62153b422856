"""A search by several processes of Ray: the same trials and the same choice as by one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recipes import OPEN, data, written

ROOT = Path(__file__).parents[2]


def searched(folder, *options):
    """What the command prints, in a process that may open sockets."""
    command = [sys.executable, "-m", "moemerge", "search", str(written(folder, OPEN)), "-o", "-", "--json", *options]
    command += [f"--data={name}={paths[0]}" for name, paths in data(folder).items()]
    command += ["--trials=10", "--max-tokens=200", "--window=20", "--compute-dtype=float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "trial 9 (" in done.stderr) == (0, True), done.stderr
    return json.loads(done.stdout)


def rounded(facts):
    """Facts with losses to 5 digits: how many threads a process has changes further ones."""
    if isinstance(facts, float):
        return round(facts, 5)
    if isinstance(facts, dict):
        return {key: rounded(value) for key, value in facts.items()}
    return [rounded(value) for value in facts] if isinstance(facts, list) else facts


@pytest.mark.slow
def test_four_workers_find_what_one_process_finds(world):
    pytest.importorskip("optuna")
    pytest.importorskip("ray")
    alone = searched(world)
    assert rounded({**searched(world, "--ray=local", "--workers=4"), "config": ""}) == rounded({**alone, "config": ""})
    assert alone["trials"][alone["chosen"]]["complete"]
