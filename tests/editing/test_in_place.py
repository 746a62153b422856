"""`moemerge edit --in-place`, `--dry-run`, and mixtures and disks that are not as usual: what is said and what is done."""

import errno
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from moemerge import PlanOptions, load_config, merge, plan_merge
from moemerge.checkpoint import copy
from tests.support.families import stored
from tests.support.kill_changes import contents
from tests.support.models import write_config


@pytest.fixture(scope="module")
def mixture(llamas, tmp_path_factory) -> Path:
    """A mixture of four experts with random routers in several shards, called base, fox, code and chat."""
    root = tmp_path_factory.mktemp("mixture")
    config = write_config(root / "merge.yaml", llamas[0], llamas, prompts=False)
    merge(plan_merge(load_config(config), PlanOptions(max_shard_bytes=100_000)), root / "mixture")
    return root / "mixture"


@pytest.fixture
def model(mixture, tmp_path) -> Path:
    return shutil.copytree(mixture, tmp_path / "home" / "model")


@pytest.fixture
def run(run):
    """Runs `moemerge edit`; gives the exit code and both outputs."""
    return partial(run, "edit")


def inodes(model: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_ino for path in model.iterdir()}


def test_a_dry_run_in_place_names_the_shards_that_are_written_and_those_that_stay(model, run):
    before, found = contents(model), inodes(model)
    flags = ("--in-place", "--replace", "fox=" + f"{model}#chat")
    planned = json.loads(run(model, *flags, "--dry-run", "--json")[1])
    code, shown, _ = run(model, *flags, "--dry-run")
    assert code == 0
    assert contents(model) == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]

    assert run(model, *flags, "--quiet") == (
        0,
        "",
        "warning: chat is there 2 times with the same router row: its copies are chosen together, and take places of "
        "other experts. With 4 experts per token none is lost\n",
    )
    after = inodes(model)
    written = {shard["name"]: shard["bytes"] for shard in planned["shards"]}
    assert written == {name: (model / name).stat().st_size for name in after.keys() - found.keys()}
    assert planned["written_bytes"] == sum(written.values())
    kept = {name for name in found if name.endswith(".safetensors") and after.get(name) == found[name]}
    assert set(planned["kept_shards"]) == kept
    assert set(planned["replaced_shards"]) == found.keys() - after.keys()
    assert kept
    assert written
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    begin = lines.index("shard in place")
    sizes = [f"{name} new, {nbytes / 1000:.2f} kB" for name, nbytes in written.items()]
    assert lines[begin + 1 :] == [
        *(f"{name} stays" for name in planned["kept_shards"]),
        *(f"{name} kept beside the model until --commit" for name in planned["replaced_shards"]),
        *sizes,
        f"{model}: nothing was written, since this was a dry run.",
    ]
    assert (
        f"disk {planned['written_bytes'] / 1000:.2f} kB to write in {len(written)} shard(s); {len(kept)} shard(s) stay"
    ) in lines


def test_another_number_per_token_writes_no_weights(model, run):
    found = inodes(model)
    assert run(model, "--in-place", "--top-k", "1", "--quiet") == (0, "", "")
    after = inodes(model)
    assert {name for name in found if after[name] != found[name]} == {
        "config.json", "moemerge_config.yaml", "README.md",
    }  # fmt: skip
    assert after.keys() == found.keys()
    assert json.loads((model / "config.json").read_text())["num_experts_per_tok"] == 1


def test_a_dry_run_refuses_the_folder_that_could_not_be_written(model, run):
    code, _, err = run(model, model.parent, "--drop", "fox", "--dry-run", "-q")
    assert (code, err) == (
        2,
        f"error: {model.parent}: holds or lies within the model {model}. Choose another output folder.\n",
    )


def test_a_mixture_in_the_hubs_cache_is_not_edited_in_place(model, tmp_path, run):
    blobs, snapshot = (
        tmp_path / "hub" / "models--a--b" / "blobs",
        tmp_path / "hub" / "models--a--b" / "snapshots" / "c0",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    before = contents(snapshot)
    assert run(snapshot, "--in-place", "--drop", "fox", "-q") == (
        2,
        "",
        f"error: {snapshot}: belongs to the Hub's cache, which other programs read, so it is not edited in place. Write "
        "to another folder.\n",
    )
    assert contents(snapshot) == before
    assert run(snapshot, tmp_path / "out", "--drop", "fox", "-q") == (0, "", "")


def test_weights_that_are_links_come_back_as_links_and_their_files_stay(mixture, model, tmp_path, run):
    store = tmp_path / "store"
    store.mkdir()
    for path in list(model.glob("*.safetensors")):
        path.rename(store / path.name)
        path.symlink_to(Path("../../store") / path.name)
    links, before = {path.name: path.is_symlink() for path in model.iterdir()}, contents(model)
    held = contents(store)
    assert run(model, "--in-place", "--order", "chat,code,fox,base", "-q") == (0, "", "")
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    assert torch.equal(stored(model)[name.format(0)], stored(mixture)[name.format(3)])
    assert contents(store) == held
    assert run(model, "--undo", "-q") == (0, "", "")
    assert {path.name: path.is_symlink() for path in model.iterdir()} == links
    assert contents(model) == before


def test_pickles_are_edited_into_a_folder_alone(mixture, model, tmp_path, run):
    torch.save(stored(model), model / "pytorch_model.bin")
    for path in model.glob("model*"):
        path.unlink()
    assert run(model, "--in-place", "--drop", "fox", "-q") == (
        2,
        "",
        f"error: {model}: its weights are pickles, which are not edited in place. Write to a folder.\n",
    )
    assert run(model, tmp_path / "out", "--drop", "fox", "-q") == (0, "", "")
    name = "model.layers.2.block_sparse_moe.experts.{}.w2.weight"
    assert torch.equal(stored(tmp_path / "out")[name.format(1)], stored(mixture)[name.format(2)])


@pytest.fixture
def quantised(model) -> Path:
    """The mixture with experts in FP8 and their scales, as DeepSeek-V3 is released."""
    tensors = {}
    for name, tensor in stored(model).items():
        if ".experts." in name:
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            tensors[name] = tensor
    for path in model.glob("model*"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("inside", [False, True])
def test_experts_in_fp8_are_left_out_with_their_scales(quantised, tmp_path, run, inside):
    before, out = load_file(quantised / "model.safetensors"), quantised if inside else tmp_path / "out"
    target = ["--in-place"] if inside else [out]
    assert run(quantised, *target, "--keep", "chat,base", "-q") == (0, "", "")
    after = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    name = "model.layers.1.block_sparse_moe.experts.{}.w3.weight{}"
    for number, kept in enumerate((3, 0)):
        for end in ("", "_scale_inv"):
            one, other = after[name.format(number, end)], before[name.format(kept, end)]
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert not [name for name in after if ".experts.2." in name]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_to_experts_in_fp8_none_is_added(quantised, llamas, tmp_path, run):
    assert run(quantised, tmp_path / "out", "--add", f"more={llamas[1]}", "-q") == (
        2,
        "",
        "error: This mixture cannot be edited so:\n"
        "  - its experts are stored as F8_E4M3, so they can be kept, left out and put into another order, but nothing "
        "can be added beside them, and they cannot be changed or split; that needs one of float32, float16, bfloat16\n",
    )


@pytest.mark.parametrize("inside", [False, True])
def test_a_disk_that_fills_up_leaves_the_model_and_nothing_else(model, tmp_path, run, monkeypatch, inside):
    before, out = contents(model), tmp_path / "home" / "out"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copy, "_copy_file_range", full)
    code, shown, err = run(model, *(["--in-place"] if inside else [out]), "--drop", "fox", "-q")
    stage = ".model.moemerge-undo/new/model-edit1-0000" if inside else ".out.moemerge-partial/model-0000"
    assert (code, shown) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'home' / stage}")
    assert err.endswith(".safetensors: the disk is full. Free some space, or write to another disk.\n")
    assert contents(model) == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(model, tmp_path, run, monkeypatch):
    usage = shutil.disk_usage(model)
    flags = ("--order", "chat,code,fox,base", "--dry-run", "--json")
    needed, whole = (json.loads(run(model, *target, *flags)[1]) for target in (["--in-place"], [tmp_path / "out"]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    advice = "but the disk has 1.00 kB free. Free some space, or write to another disk.\n"
    assert run(model, "--in-place", *flags[:2], "-q") == (
        1,
        "",
        f"error: {model}: what changes, beside what it replaces, takes {needed['written_bytes'] / 1000:.2f} kB, {advice}",
    )
    assert run(model, tmp_path / "out", *flags[:2], "-q") == (
        1,
        "",
        f"error: {tmp_path / 'out'}: the model takes {whole['output_bytes'] / 1000:.2f} kB, {advice}",
    )
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("words", [["--in-place", "--drop", "fox"], ["--undo"], ["--commit"]])
def test_while_another_process_edits_it_a_model_is_left_alone(model, run, words):
    before = contents(model)
    with FileLock(model.parent / ".model.moemerge-undo.lock"):
        assert run(model, *words, "-q") == (
            1,
            "",
            f"error: {model}: another moemerge is writing to it. Wait for it to end.\n",
        )
    assert contents(model) == before
