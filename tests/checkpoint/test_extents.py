"""Shards laid out so that a file system can share their blocks with the sources'."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint import extents
from moemerge.checkpoint.extents import BLOCK_BYTES, layout_to_share, shared_bytes, shares_extents
from moemerge.checkpoint.header import read_header
from moemerge.checkpoint.shards import TensorSpec
from moemerge.checks.verification import verify_merge
from moemerge.planning.options import PlanOptions
from tests.support.models import make_model, write_config


@pytest.fixture
def small(monkeypatch):
    """Tiny tensors count."""
    monkeypatch.setattr(extents, "SMALL_TENSOR_BYTES", 1)
    monkeypatch.setattr(extents, "SMALL_SHARD_BYTES", 1)


sources = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=20)


@given(sources, st.integers(1, 8 * BLOCK_BYTES))
def test_every_tensor_is_written_once_and_shared_ones_lie_as_in_their_sources(made, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extents, "SMALL_TENSOR_BYTES", 1)
        patch.setattr(extents, "SMALL_SHARD_BYTES", 1)
        tensors, starts = [], {}
        for number, (phase, blocks, copied) in enumerate(made):
            tensors.append(TensorSpec(f"t{number}", "U8", (blocks * BLOCK_BYTES,), blocks * BLOCK_BYTES))
            if copied:
                starts[f"t{number}"] = number * BLOCK_BYTES + 104 * phase
        shards = layout_to_share(tensors, starts, limit)
    by_name = {tensor.name: tensor for tensor in tensors}
    assert sorted(name for shard in shards for name in shard.starts) == sorted(by_name)
    for shard in shards:
        data = sum(by_name[name].nbytes for name in shard.starts)
        assert shard.nbytes == len(shard.header) + data
        assert data <= limit or len(shard.starts) == 1
        assert len(shard.header) % 8 == 0
        for name in shard.starts.keys() & starts.keys():
            assert (shard.starts[name] - starts[name]) % BLOCK_BYTES == 0
    blocks = sum(by_name[name].nbytes // BLOCK_BYTES - (starts[name] % BLOCK_BYTES > 0) for name in starts)
    assert shared_bytes(tensors, starts, shards) == blocks * BLOCK_BYTES


def test_small_and_odd_tensors_are_kept_together_at_the_end_before_the_last():
    big = 80 * 2**20
    tensors = [
        TensorSpec("norm", "F32", (8,), 32),
        TensorSpec("a", "U8", (big,), big),
        TensorSpec("odd", "U8", (big,), big),
        TensorSpec("b", "U8", (big,), big),
        TensorSpec("bias", "F32", (8,), 32),
    ]
    starts = {"norm": 8, "a": 1096, "odd": 13, "b": 5000}
    shards = layout_to_share(tensors, starts, 10**9, [TensorSpec("router", "F32", (8,), 32)])
    assert [list(shard.starts) for shard in shards] == [["a"], ["b"], ["norm", "bias", "odd"], ["router"]]
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]


@pytest.fixture
def disk(tmp_path, request):
    """A file system that shares blocks, where this process may mount one."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * 2**20)
    try:
        subprocess.run([f"mkfs.{request.param}", "-q", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no {request.param} can be made and mounted here: {error}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("disk", ["xfs", "btrfs"], indirect=True)
def test_on_such_a_file_system_a_merge_takes_no_room(disk, small):
    folders = [
        make_model(disk / name, seed, hidden_size=256, intermediate_size=2048) for seed, name in enumerate("abc")
    ]
    path = write_config(disk / "merge.yaml", folders[0], folders[1:], prompts=False)
    out = disk / "out"
    plan = plan_merge(load_config(path), PlanOptions(target=out))
    assert plan.shared_bytes > 0.95 * plan.tensor_bytes
    os.sync()
    before = os.statvfs(disk)
    merge(plan, out)
    os.sync()
    after = os.statvfs(disk)
    taken = (before.f_bfree - after.f_bfree) * before.f_frsize
    assert taken < plan.tensor_bytes - plan.shared_bytes + 2**21
    assert verify_merge(plan, out).differences == ()
    elsewhere = plan_merge(load_config(path), PlanOptions(target=disk.parent / "out"))
    assert elsewhere.shared_bytes == 0


def test_where_nothing_is_shared_the_layout_is_the_usual_one(tmp_path, llamas):
    path = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], prompts=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moemerge.checkpoint.extents.shares_extents", lambda _source, _folder: False)
        assert (
            plan_merge(load_config(path), PlanOptions(target=tmp_path / "out")).shards
            == plan_merge(load_config(path)).shards
        )


def test_the_trial_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(BLOCK_BYTES))
    assert shares_extents(source, tmp_path / "not" / "there") in {True, False}
    assert list(tmp_path.iterdir()) == [source]


def test_a_header_may_place_its_data_anywhere_in_a_block(tmp_path, small, llamas):
    path = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], prompts=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moemerge.checkpoint.extents.shares_extents", lambda _source, _folder: True)
        plan = plan_merge(load_config(path), PlanOptions(target=tmp_path / "out"))
    assert plan.shared_bytes > 0
    merge(plan, tmp_path / "out")
    for shard in plan.shards:
        found = read_header(tmp_path / "out" / shard.name)
        assert {name: tensor.start for name, tensor in found.items()} == shard.starts
    assert verify_merge(plan, tmp_path / "out").differences == ()
