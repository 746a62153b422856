"""Merges by several processes: the same bytes as by one, whoever dies."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import make_model, write_config

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_processes_on_several_nodes_write_what_one_writes_whoever_dies(tmp_path):
    pytest.importorskip("ray")
    models = [make_model(tmp_path / name, seed, tuned_from=0) for seed, name in enumerate(("base", "fox", "code"))]
    sharing = {"shared_weights": {"method": "ties", "density": 0.3}}
    config = write_config(tmp_path / "merge.yaml", models[0], models[1:], prompts=False, dtype="bfloat16", **sharing)
    (tmp_path / "merges").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ray_merges", str(config), str(tmp_path / "merges")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    refused = found.pop("refused")
    assert found == {
        "shards": found["shards"],
        "together": True,
        "processes": found["processes"],
        "nodes": found["nodes"],
        "worker killed": True,
        "begun again": 1,
        "head killed": True,
        "kept": found["kept"],
        "done after that": found["shards"] - found["kept"],
        "node removed": True,
        "left": ["log", "out"] * 4,
    }
    assert 2 <= found["nodes"] <= found["processes"] <= 4
    assert 3 <= found["kept"] < found["shards"]
    hidden = tmp_path / "merges/hidden/.out.moemerge-partial"
    assert refused in {
        f"--ray: {socket.gethostname()} does not see the folder {hidden}. All processes of --ray need it at the same "
        "path: put it on a disk that their machines share.",
        None,  # a container without namespaces of its own
    }
    assert not [path for path in hidden.parent.glob("*") if path.name != "log"]
