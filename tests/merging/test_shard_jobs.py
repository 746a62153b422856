"""Shards as jobs for other processes: equal bytes whatever they are made of, and refusals of other surroundings."""

import os
import re
import shutil
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.writer import ShardWriter
from moemerge.errors import CheckpointError, OutputError, RefusedError
from moemerge.merging.merge_work import Work
from moemerge.merging.options import MergeOptions
from moemerge.merging.shard_jobs import FolderWorker, SharedStage, Surroundings, jobs_of
from moemerge.planning.options import PlanOptions
from tests.support.models import make_model, write_config

SHARD_BYTES = 20_000
HOST = socket.gethostname()
SHARED = "All processes of --ray need it at the same path: put it on a disk that their machines share"
# Everything that is computed on the way: noise, drawn neurons, mixed attention, factors.
COMPUTED = [
    {"dtype": "bfloat16", "shared_weights": {"method": "ties", "density": 0.3}},
    {"shared_weights": {"method": "dare", "density": 0.5, "seed": 3}},
    {"shared_weights": "average", "fold_norms": True},
]


def planned(folder, **keys):
    models = [make_model(folder / name, seed, tuned_from=0) for seed, name in enumerate(("base", "fox", "code"))]
    config = write_config(folder / "merge.yaml", models[0], models[1:], prompts=False, **keys)
    text = config.read_text().replace(f"source_model: {models[2]}", f"noise_scale: 0.01\n  source_model: {models[2]}")
    text = text.replace(f"source_model: {models[1]}", f"reinit: 0.5\n  source_model: {models[1]}")
    config.write_text(text)
    return plan_merge(load_config(config), PlanOptions(max_shard_bytes=SHARD_BYTES))


@pytest.fixture
def plan(tmp_path):
    return planned(tmp_path)


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "stage").mkdir()
    return tmp_path / "stage"


def worker_of(plan, stage):
    jobs = list(jobs_of(plan, plan.shards_without_routers))
    writer = Work(plan, MergeOptions(seed=5), lambda _: None).make_writer
    return FolderWorker(Surroundings.of(jobs), writer, SharedStage.of(stage)), jobs


def refusal(worker) -> str:
    with pytest.raises(RefusedError) as refused:
        worker.check()
    return str(refused.value)


@pytest.mark.parametrize("keys", COMPUTED)
def test_a_process_that_has_only_what_it_was_sent_writes_the_same_bytes(tmp_path, stage, keys):
    pickle = pytest.importorskip("cloudpickle")
    plan = planned(tmp_path, **keys)
    assert "noise_scale=0.01" in repr(plan.outputs)
    assert "drawn anew" in repr(plan.outputs)
    worker, jobs = pickle.loads(pickle.dumps(worker_of(plan, stage)))
    worker.check()
    for job in jobs:
        worker.run(pickle.loads(pickle.dumps(job)))
    merge(plan, tmp_path / "out", MergeOptions(seed=5))
    written = {path.name: path.read_bytes() for path in stage.glob("[!.]*")}
    assert written == {s.name: (tmp_path / "out" / s.name).read_bytes() for s in plan.shards_without_routers}
    assert len(written) > 4


def test_the_largest_shards_are_first_and_each_carries_its_sources_alone(plan):
    jobs = list(jobs_of(plan, plan.shards_without_routers))
    sizes = [job.shard.nbytes for job in jobs]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes != [shard.nbytes for shard in plan.shards_without_routers]
    for job in jobs:
        assert job.bands.keys() == job.shard.starts.keys()
        assert {path.name for path in job.stamps} == {"model.safetensors"}
    assert {len(job.stamps) for job in jobs} > {1}


def test_a_process_that_died_leaves_no_trace(plan, stage):
    worker, jobs = worker_of(plan, stage)
    name = jobs[0].shard.name
    (stage / f".{name}.0123.draft").write_bytes(b"half")
    (stage / f".{jobs[1].shard.name}.4567.draft").write_bytes(b"half")
    worker.run(jobs[0])
    assert {path.name for path in stage.iterdir()} == {name, ".shared", f".{jobs[1].shard.name}.4567.draft"}
    worker_of(plan, stage)[0]._stage.forget()
    assert [path.name for path in stage.iterdir()] == [name]


def test_a_process_that_was_given_up_for_dead_damages_nothing(plan, stage):
    slow, jobs = worker_of(plan, stage)
    fast, _ = worker_of(plan, stage)
    name, whole = jobs[0].shard.name, []

    class Overtaken(ShardWriter):
        def __enter__(self):
            super().__enter__()
            fast.run(jobs[0])
            whole.append((stage / name).read_bytes())
            return self

    slow._writer = partial(Overtaken, **slow._writer.keywords)
    with pytest.raises(OutputError, match=r"\.draft: cannot be written: No such file or directory"):
        slow.run(jobs[0])
    assert (stage / name).read_bytes() == whole[0]


def test_a_machine_that_does_not_see_the_folder_is_refused(plan, stage, tmp_path):
    worker, _ = worker_of(plan, stage)
    expected = f"--ray: {HOST} does not see the folder {stage}. {SHARED}."
    shutil.move(stage, tmp_path / "elsewhere")
    assert refusal(worker) == expected
    stage.mkdir()
    assert refusal(worker) == expected
    (stage / ".shared").write_text("of another merge")
    assert refusal(worker) == expected


def test_a_machine_with_other_sources_is_refused(plan, stage, tmp_path):
    worker, jobs = worker_of(plan, stage)
    source = tmp_path / "fox" / "model.safetensors"
    shutil.copy2(source, tmp_path / "copy")
    source.unlink()
    assert refusal(worker) == (
        f"--ray: on {HOST}, {source} cannot be found (No such file or directory). {SHARED}, or copy it with its times."
    )
    (tmp_path / "copy").rename(source)
    worker.check()  # another inode, but the same size and time
    os.utime(source, ns=(0, 0))
    assert refusal(worker) == f"--ray: on {HOST}, {source} is another file. {SHARED}, or copy it with its times."
    job = next(job for job in jobs if source in job.stamps)
    with pytest.raises(CheckpointError) as raised:
        worker.run(job)
    assert str(raised.value) == (
        f"{source}: on {HOST}, is another file. The output would be of two models. Merge again."
    )
    assert not (stage / job.shard.name).exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_machine_that_may_not_write_is_refused(plan, stage):
    worker, _ = worker_of(plan, stage)
    stage.chmod(0o555)
    try:
        assert refusal(worker) == (
            f"--ray: {HOST} may not write into {stage} (Permission denied). Let it be mounted for writing there."
        )
    finally:
        stage.chmod(0o755)


def test_processes_on_one_machine_may_check_at_the_same_moment(plan, stage, monkeypatch):
    first, second = (worker_of(plan, stage)[0] for _ in range(2))
    first._stage = second._stage
    write = Path.write_text

    def meanwhile(path, text):
        done = write(path, text)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", write)
            second.check()
        return done

    monkeypatch.setattr(Path, "write_text", meanwhile)
    first.check()
    assert [path.name for path in stage.iterdir()] == [".shared"]


def test_a_machine_with_other_versions_is_refused(plan, stage):
    worker, _ = worker_of(plan, stage)
    here = worker._here.versions
    assert re.fullmatch(rf"moemerge \S+ and numpy {re.escape(np.__version__)}", here)
    worker._here = replace(worker._here, versions="moemerge 0.0 and numpy 9.9")
    assert refusal(worker) == (
        f"--ray: {HOST} has {here}, and this machine moemerge 0.0 and numpy 9.9. Install the same there."
    )
