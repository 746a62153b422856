"""A search on a Ray cluster of several nodes finds what one process finds."""

import json
import os
import subprocess
import sys

import pytest

from tests.searching.test_ray import rounded
from tests.support.machine import ROOT
from tests.support.recipes import OPEN, data, make_world, written


def searched(folder, *options, beside=()):
    """What the command printed, or its exit code and what it said if it failed."""
    written(folder, OPEN)
    command = [*beside, "env", f"--chdir={folder}", sys.executable, "-m", "moemerge", "search", "recipe.yaml"]
    command += [f"--data={name}={paths[0]}" for name, paths in data(folder).items()]
    command += [
        "--trials=10",
        "--max-tokens=200",
        "--window=20",
        "--compute-dtype=float32",
        "-o",
        "-",
        "--json",
        *options,
    ]
    paths = os.pathsep.join(str(path) for path in (ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    return json.loads(done.stdout) if done.returncode == 0 else (done.returncode, done.stderr.splitlines())


@pytest.mark.slow
def test_nodes_of_any_size_find_what_one_process_finds(tmp_path):
    pytest.importorskip("optuna")
    pytest.importorskip("ray")
    make_world(tmp_path)
    nodes = [sys.executable, "-m", "tests.scale.raylets", "1,1,2"]
    alone = searched(tmp_path)
    # An equal share of the CPUs is 2 for each of two processes, which only one node has; and the recipe's paths count
    # from a folder that is not the one in which the nodes were begun.
    found = searched(tmp_path, "--ray=auto", "--workers=2", beside=nodes)
    assert rounded({**found, "config": ""}) == rounded({**alone, "config": ""})
    code, said = searched(tmp_path, "--ray=auto", "--workers=5", beside=nodes)
    refusal = "error: --workers 5: the cluster has 4 CPUs, and each process takes one. Ask for 4 at most."
    assert (code, refusal in said) == (2, True), said
