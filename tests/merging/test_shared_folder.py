"""Merges by several processes: the same bytes as by one, whoever dies."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.staging import kept_shards
from moemerge.errors import MoemergeError, OutputError
from moemerge.merging import shard_jobs
from moemerge.merging.options import MergeOptions
from moemerge.merging.shared_folder import SharedFolder
from moemerge.planning.options import PlanOptions
from tests.support.kill import contents
from tests.support.models import make_model, write_config
from tests.support.stand_in_ray import Ray

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # for the time of the test
    return Ray().install()


def planned(folder):
    models = [make_model(folder / name, seed) for seed, name in enumerate(("base", "fox", "code"))]
    config = write_config(folder / "merge.yaml", models[0], models[1:], prompts=False)
    return plan_merge(load_config(config), PlanOptions(max_shard_bytes=20_000))


def test_a_folder_is_the_same_however_many_processes_died_for_it(tmp_path, ray):
    plan = planned(tmp_path)
    merge(plan, tmp_path / "alone" / "out")
    ray.lives = [0, 2, 1000]
    done = []
    merge(plan, SharedFolder(tmp_path / "out"), progress=lambda task, n, _: task.stage == "weights" and done.append(n))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone" / "out")
    assert len(ray.made) == 2 + 2  # one on each machine, and what took the places of those that died
    assert (done[-1], done) == (plan.tensor_bytes, sorted(done))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_where_all_died_the_rest_is_done_by_one(tmp_path, ray):
    plan = planned(tmp_path)
    ray.lives = [1]
    with pytest.raises(MoemergeError, match="all processes of the Ray cluster died: killed"):
        merge(plan, SharedFolder(tmp_path / "out", workers=1))
    assert kept_shards(tmp_path / "out") == 3
    ray.lives = [1000]
    written = len(plan.shards_without_routers) - 3
    merge(plan, SharedFolder(tmp_path / "out", workers=1), MergeOptions(resume=True))
    assert ray.made[-1].life == 1000 - written
    merge(plan, tmp_path / "alone" / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone" / "out")


def test_a_shard_that_is_not_seen_here_is_missed(tmp_path, ray, monkeypatch):
    assert ray.nodes()
    plan = planned(tmp_path)
    monkeypatch.setattr(shard_jobs.FolderWorker, "run", lambda *_: None)
    with pytest.raises(OutputError) as raised:
        merge(plan, SharedFolder(tmp_path / "out"))
    lost = tmp_path / ".out.moemerge-partial" / plan.shards[0].name
    assert str(raised.value) == (
        f"{lost}: was written by a process of --ray, but is not seen here. Write to a disk that all machines see in "
        "the same state."
    )


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
    # Ray's own messages, as of the node that was removed, come before and after.
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
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
