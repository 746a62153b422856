"""Shards of a changed model: what stays is kept, what is written is small, and every reader reads it."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.changed_shards import ChangedShards, StoredTensors, lay_out_changes
from moemerge.checkpoint.extents import BLOCK_BYTES
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.in_place import changing, commit, replace_model, undo
from moemerge.checkpoint.index import SAFETENSORS_INDEX, SINGLE_SAFETENSORS
from moemerge.checkpoint.pieces import Band, Piece
from moemerge.checkpoint.shards import TensorSpec
from moemerge.checkpoint.writer import ShardWriter
from moemerge.planning.options import PlanOptions
from moemerge.sources.model_folder import open_merged
from moemerge.sources.tensor_tables import read_tensor_table
from tests.checkpoint.test_extents import disk, small  # noqa: F401  fixtures
from tests.support.models import load, load_weights, logits, make_model, save_weights, write_config

BLOCK = "model.layers.0.block_sparse_moe."
W1 = f"{BLOCK}experts.{{}}.w1.weight"
Bands = dict[str, tuple[Band, ...]]


@pytest.fixture
def out(tmp_path, llamas) -> Path:
    """A mixture in many shards, the routers in the last."""
    config = write_config(tmp_path / "merge.yaml", llamas[0], llamas[1:], prompts=False)
    merge(plan_merge(load_config(config), PlanOptions(max_shard_bytes=40_000)), tmp_path / "out")
    return tmp_path / "out"


def tables(out: Path) -> tuple[StoredTensors, Bands]:
    """The tensors of a model, and the same as what a model is to be made of."""
    tensors = read_tensor_table(open_merged(out), lambda _: None)
    return StoredTensors(out, tensors), {name: ((Piece(tensor, tensor.dtype),),) for name, tensor in tensors.items()}


def lay_out(stored: StoredTensors, bands: Bands) -> ChangedShards:
    wanted = []
    for name, ((piece, *_), *_) in bands.items():
        assert isinstance(piece.source, TensorInfo)
        wanted.append(TensorSpec(name, piece.dtype, piece.source.shape, piece.nbytes))
    last = [name for name in bands if ".gate." in name]
    return lay_out_changes(stored, wanted, bands, last=last, max_shard_bytes=40_000)


def apply(out: Path, changes: ChangedShards, bands: Bands) -> None:
    """Change the model in place."""
    with changing(out, changes.needed_bytes) as new:
        with ShardWriter(new, changes.written, lambda _: None, reserve=not changes.shared_bytes) as shards:
            shards.add(bands)
        removed = [*changes.removed]
        if changes.index is None:
            removed.append(SAFETENSORS_INDEX)
        else:
            (new / SAFETENSORS_INDEX).write_text(changes.index)
        replace_model(out, removed)


def holders(tensors: Mapping[str, TensorInfo], *names: str) -> set[str]:
    return {Path(str(tensors[name].path)).name for name in names}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_change_of_nothing_keeps_every_file(out):
    stored, bands = tables(out)
    changes = lay_out(stored, bands)
    assert (changes.written, changes.removed, changes.needed_bytes) == ((), (), 0)
    assert sorted(changes.kept) == sorted(path.name for path in out.glob("*.safetensors"))
    assert json.loads(changes.index or "") == json.loads((out / SAFETENSORS_INDEX).read_text())


def test_one_tensor_changed_writes_its_shard_alone_and_goes_back(out):
    stored, bands = tables(out)
    before, tensors = weights(out), load_weights(out)
    bands[W1.format(0)] = bands[W1.format(1)]
    changes = lay_out(stored, bands)
    held = holders(stored.tensors, W1.format(0))
    assert set(changes.removed) == held
    assert [shard.name for shard in changes.written] == ["model-edit1-00001.safetensors"]
    assert changes.needed_bytes <= 1.1 * sum((out / name).stat().st_size for name in held)
    apply(out, changes, bands)
    assert same(load_weights(out), tensors | {W1.format(0): tensors[W1.format(1)]})
    assert {name: text for name, text in weights(out).items() if name in before and "index" not in name}.items() <= (
        before.items()
    )
    load(out)
    undo(out)
    assert weights(out) == before


def test_shards_that_are_links_are_known_by_their_names_in_the_folder(out, tmp_path):
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(out.glob("*.safetensors"))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    before, tensors = weights(out), load_weights(out)
    stored, bands = tables(out)
    bands[W1.format(0)] = bands[W1.format(1)]
    changes = lay_out(stored, bands)
    assert len(changes.removed) == 1
    assert {*changes.removed, *changes.kept} == before.keys() - {SAFETENSORS_INDEX}
    apply(out, changes, bands)
    assert same(load_weights(out), tensors | {W1.format(0): tensors[W1.format(1)]})
    undo(out)
    assert weights(out) == before


def test_a_second_change_has_other_names(out):
    for number in (1, 2):
        stored, bands = tables(out)
        bands[W1.format(0)], bands[W1.format(1)] = bands[W1.format(1)], bands[W1.format(0)]
        expected = load_weights(out)
        expected[W1.format(0)], expected[W1.format(1)] = expected[W1.format(1)], expected[W1.format(0)]
        changes = lay_out(stored, bands)
        assert {shard.name.rsplit("-", 1)[0] for shard in changes.written} == {f"model-edit{number}"}
        apply(out, changes, bands)
        commit(out)
        assert same(load_weights(out), expected)


def test_changed_routers_write_the_last_shard_alone(out):
    stored, bands = tables(out)
    one, other = (f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1))
    bands[one], bands[other] = bands[other], bands[one]
    changes = lay_out(stored, bands)
    assert (
        set(changes.removed)
        == holders(stored.tensors, one, other)
        == {max(path.name for path in out.glob("*.safetensors"))}
    )
    (shard,) = changes.written
    assert shard.starts.keys() == {name for name in bands if ".gate." in name}


def test_a_model_without_an_expert_is_read_as_before(out):
    """Its shards are written anew without holes, the routers lose a row, and transformers computes the rest."""
    stored, bands = tables(out)
    tensors = load_weights(out)
    dropped = [name for name in bands if ".experts.2." in name]
    for name in dropped:
        del bands[name], tensors[name]
    for name, gate in stored.tensors.items():
        if ".gate." in name:
            bands[name] = ((Piece(gate.rows(0, 2), gate.dtype),),)
            tensors[name] = tensors[name][:2]
    changes = lay_out(stored, bands)
    assert set(changes.removed) == holders(stored.tensors, *dropped, *(name for name in bands if ".gate." in name))
    assert changes.kept
    *copied, routers = changes.written
    assert routers.starts.keys() == {name for name in bands if ".gate." in name}
    assert not any(".gate." in name for shard in copied for name in shard.starts)
    apply(out, changes, bands)
    assert same(load_weights(out), tensors)
    config = json.loads((out / "config.json").read_text()) | {"num_local_experts": 2}
    (out / "config.json").write_text(json.dumps(config))
    found = logits(load(out))
    save_weights(out, tensors)
    assert torch.equal(found, logits(load(out)))


def test_a_tensor_with_another_name_stays_in_its_place(out):
    stored, bands = tables(out)
    one, new = W1.format(2), W1.format(3)
    bands = {new if name == one else name: made for name, made in bands.items()}
    tensors = {new if name == one else name: tensor for name, tensor in load_weights(out).items()}
    changes = lay_out(stored, bands)
    assert set(changes.removed) == holders(stored.tensors, one)
    (shard,) = changes.written
    held = sorted(
        (tensor.start, name) for name, tensor in stored.tensors.items() if tensor.path.name in changes.removed
    )
    assert list(shard.starts) == [new if name == one else name for _, name in held]
    apply(out, changes, bands)
    assert same(load_weights(out), tensors)


def test_a_new_tensor_gets_a_new_shard_before_the_routers(out):
    stored, bands = tables(out)
    bands["a.new.weight"] = bands[W1.format(0)]
    bands["model.layers.0.block_sparse_moe.gate.bias"] = bands["model.norm.weight"]
    changes = lay_out(stored, bands)
    assert changes.removed == ()
    assert [list(shard.starts) for shard in changes.written] == [
        ["a.new.weight"],
        ["model.layers.0.block_sparse_moe.gate.bias"],
    ]


def test_a_model_of_one_file_gets_an_index_when_that_no_longer_holds_all(out):
    """transformers reads a file of that name alone."""
    save_weights(out, load_weights(out))
    stored, bands = tables(out)
    unchanged = lay_out(stored, bands)
    assert (unchanged.kept, unchanged.index) == ((SINGLE_SAFETENSORS,), None)
    bands["a.new.weight"] = bands[W1.format(0)]
    changes = lay_out(stored, bands)
    assert (changes.kept, changes.removed) == ((), (SINGLE_SAFETENSORS,))
    tensors = load_weights(out)
    apply(out, changes, bands)
    assert same(load_weights(out), tensors | {"a.new.weight": tensors[W1.format(0)]})
    assert not any(".gate." in name for name in load_file(out / "model-edit1-00001.safetensors"))


@pytest.mark.parametrize("disk", ["xfs", "btrfs"], indirect=True)
def test_where_blocks_are_shared_an_expert_is_replaced_at_once_and_without_room(disk, small):  # noqa: F811
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 4}
    folders = [make_model(disk / name, seed, **sizes) for seed, name in enumerate("abc")]
    out = disk / "out"
    config = write_config(disk / "merge.yaml", folders[0], folders[1:], prompts=False)
    merge(plan_merge(load_config(config), PlanOptions(target=out)), out)
    stored, bands = tables(out)
    names = [name for name in bands if ".layers.1." in name and ".experts.0." in name]
    for name in names:
        bands[name] = bands[name.replace(".experts.0.", ".experts.1.")]
    changes = lay_out(stored, bands)
    os.sync()
    before, begun = os.statvfs(disk), time.monotonic()
    apply(out, changes, bands)
    taken_seconds = time.monotonic() - begun
    os.sync()
    after = os.statvfs(disk)
    taken_bytes = (before.f_bfree - after.f_bfree) * before.f_frsize
    # A block at either end of a tensor may be a copy.
    tensors = sum(len(shard.starts) for shard in changes.written)
    assert changes.shared_bytes > 20 * taken_bytes
    assert taken_bytes <= 2 * BLOCK_BYTES * tensors + 2**20
    assert changes.needed_bytes <= 2 * BLOCK_BYTES * tensors + 2**17
    assert taken_seconds < 1
    found = load_weights(out)
    assert all(torch.equal(found[name], found[name.replace(".experts.0.", ".experts.1.")]) for name in names)
