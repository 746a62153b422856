"""Proof against the reference: merged models computed by transformers, and bytes compared with their sources."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moemerge import load_config, merge, plan_merge
from moemerge.merging.options import MergeOptions
from moemerge.planning.options import PlanOptions
from tests.support.families import VARIANTS
from tests.support.models import (
    assert_close,
    edit_json,
    load,
    load_weights,
    logits,
    make_model,
    save_weights,
    write_config,
)

MODES = ("hidden", "cheap_embed", "random", "uniform_random")


def merged(tmp_path: Path, base: Path, experts: list[Path], **keys) -> Path:
    path = write_config(tmp_path / "merge.yaml", base, experts, **keys)
    merge(plan_merge(load_config(path, allow_identical_experts=True)), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        pytest.param(variant, mode, marks=() if variant == "llama" or mode == "hidden" else pytest.mark.slow)
        for variant in VARIANTS
        for mode in MODES
    ],
)
def test_identical_experts_compute_what_the_base_computes(tmp_path, variant, mode):
    model_type, sizes = VARIANTS[variant]
    base = make_model(tmp_path / "base", 1, model_type, **sizes)
    out = merged(tmp_path, base, [base] * 3, gate_mode=mode)
    assert_close(logits(load(out)), logits(load(base)))


def test_the_window_matters_where_it_is_tested(tmp_path):
    base = make_model(tmp_path / "base", 1, "mistral", sliding_window=8)
    narrow = logits(load(base))
    edit_json(base / "config.json", sliding_window=128)
    assert (logits(load(base)) - narrow).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["llama", "llama, tied", "mistral, window of 8"])
@pytest.mark.parametrize("chosen", [0, 2])
def test_routers_forced_to_one_expert_compute_the_base_with_its_ffns(tmp_path, variant, chosen):
    model_type, sizes = VARIANTS[variant]
    base, *experts = [make_model(tmp_path / f"{seed}", seed, model_type, **sizes) for seed in range(4)]
    out = merged(tmp_path, base, experts, gate_mode="random", experts_per_token=1)
    model = load(out)
    for layer in model.model.layers:
        block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        forced = torch.zeros_like(block.gate.weight)
        block.gate.weight.data = forced
        # softmax routers see only differences, and have no bias: force the choice, not the logits
        block.gate.register_forward_hook(lambda _module, _inputs, output: _force(output, chosen))
    dense = load(base)
    for layer, source in zip(dense.model.layers, load(experts[chosen]).model.layers, strict=True):
        layer.mlp.load_state_dict(source.mlp.state_dict())
    assert_close(logits(model), logits(dense))


def _force(output, chosen):
    if isinstance(output, tuple):  # transformers 5: (logits, weights, indices)
        return output[0], torch.ones_like(output[1]), torch.full_like(output[2], chosen)
    forced = torch.full_like(output, -1e4)
    forced[:, chosen] = 1e4
    return forced


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_copied_tensors_are_byte_equal_and_every_source_tensor_is_accounted_for(tmp_path, llamas, shard_bytes):
    base, *experts = llamas
    path = write_config(tmp_path / "merge.yaml", base, experts, gate_mode="uniform_random")
    merge(plan_merge(load_config(path), PlanOptions(max_shard_bytes=shard_bytes)), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes < 10**9)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name for name in found if ".gate." in name} == load_file(files[-1]).keys()
    used = set()
    for number, source in enumerate([base, *experts]):
        for name, tensor in load_weights(source).items():
            if ".mlp." not in name:
                target = name if number == 0 else None
            elif number:
                part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[name.split(".")[-2]]
                layer = name.split(".")[2]
                target = f"model.layers.{layer}.block_sparse_moe.experts.{number - 1}.{part}.weight"
            else:
                target = None
            if target:
                assert torch.equal(found[target], tensor), target
                used.add(target)
    assert found.keys() - used == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(3)}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0


def test_index_names_every_tensor_and_its_total_is_right(tmp_path, llamas):
    base, *experts = llamas
    path = write_config(tmp_path / "merge.yaml", base, experts, gate_mode="random")
    merge(plan_merge(load_config(path), PlanOptions(max_shard_bytes=30_000)), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert {name for name, place in index["weight_map"].items() if place == file.name} == load_file(file).keys()
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()
    )
    merge(plan_merge(load_config(path)), tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "whole")))


@pytest.mark.parametrize("layout", ["bin", "bin shards", "shards without an index", "lm_head stored though tied"])
def test_every_layout_of_a_source_gives_the_same_merge(tmp_path, layout):
    tied = {"tie_word_embeddings": layout == "lm_head stored though tied"}
    base = make_model(tmp_path / "base", 1, **tied)
    experts = [make_model(tmp_path / f"expert{seed}", seed, **tied) for seed in (2, 3)]
    expected = logits(load(merged(tmp_path, base, experts, gate_mode="random")))
    for folder in (base, *experts):
        tensors = load_weights(folder)
        names = sorted(tensors)
        (folder / "model.safetensors").unlink()
        halves = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
        if layout == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        elif layout == "bin shards":
            for number, half in enumerate(halves, start=1):
                torch.save(half, folder / f"pytorch_model-{number:05d}-of-00002.bin")
            weight_map = {n: f"pytorch_model-{1 + (n in halves[1]):05d}-of-00002.bin" for n in names}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        elif layout == "shards without an index":
            for number, half in enumerate(halves, start=1):
                save_file(half, folder / f"model-{number:05d}-of-00002.safetensors")
            save_file(halves[0], folder / "consolidated.safetensors")
        else:
            head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
            save_weights(folder, tensors | head)
    shutil.rmtree(tmp_path / "out")
    assert_close(logits(load(merged(tmp_path, base, experts, gate_mode="random"))), expected)


def test_noise_and_residual_scale_do_what_they_say(tmp_path, llamas):
    base, first, second, _ = llamas
    path = tmp_path / "merge.yaml"
    path.write_text(
        f"base_model: {base}\ngate_mode: random\nexperts:\n"
        f"- {{source_model: {first}, noise_scale: 0.5}}\n- {{source_model: {second}, residual_scale: 0.25}}\n"
        f"- {{source_model: {first}, noise_scale: 0.5}}\n"
    )
    for out in ("one", "two"):
        merge(plan_merge(load_config(path)), tmp_path / out, MergeOptions(seed=3))
    merge(plan_merge(load_config(path)), tmp_path / "other", MergeOptions(seed=4))
    one, two, other = (load_weights(tmp_path / out) for out in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (load_weights(folder) for folder in (first, second))
    block = "model.layers.1.block_sparse_moe.experts"
    noise = one[f"{block}.0.w1.weight"] - first["model.layers.1.mlp.gate_proj.weight"]
    again = one[f"{block}.2.w1.weight"] - first["model.layers.1.mlp.gate_proj.weight"]
    assert abs(float((noise * again).mean())) < 0.05  # each expert has noise of its own
    assert 0.45 < float(noise.std()) < 0.55
    assert abs(float(noise.mean())) < 0.05
    assert not torch.equal(one[f"{block}.0.w1.weight"], other[f"{block}.0.w1.weight"])
    assert torch.equal(one[f"{block}.1.w2.weight"], second["model.layers.1.mlp.down_proj.weight"] * 0.25)
    assert torch.equal(one[f"{block}.1.w1.weight"], second["model.layers.1.mlp.gate_proj.weight"])


@pytest.mark.parametrize("name", ["bf16", "fp16", "float32"])
def test_dtype_converts_every_tensor(tmp_path, llamas, name):
    base, *experts = llamas
    out = merged(tmp_path, base, experts, gate_mode="random", dtype=name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[name]
    found = load_weights(out)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    source = load_weights(experts[1])["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(found["model.layers.2.block_sparse_moe.experts.1.w2.weight"], source.to(dtype))
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == str(dtype).removeprefix("torch.")


def test_without_dtype_the_merge_is_stored_as_the_base_is(tmp_path):
    base = make_model(tmp_path / "base", 0, dtype=torch.bfloat16)
    experts = [make_model(tmp_path / f"{seed}", seed, dtype=torch.float32) for seed in (1, 2)]
    out = merged(tmp_path, base, experts, gate_mode="random")
    assert {tensor.dtype for tensor in load_weights(out).values()} == {torch.bfloat16}


def test_generation_with_a_cache_agrees_with_the_base(tmp_path):
    base = make_model(tmp_path / "base", 1)
    out = merged(tmp_path, base, [base] * 3, gate_mode="hidden")
    prompt = torch.tensor([[1, 20, 30, 40]])
    keys = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    assert torch.equal(load(out).generate(prompt, **keys), load(base).generate(prompt, **keys))
