"""The streamed pass of every dense family against the whole model, as transformers computes it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from moemerge.families.dense import DENSE_FAMILIES, ModelTensors, read_dense
from moemerge.families.mixture_shape import Mixture
from moemerge.passes import decoder, device, proving
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import read_tokenizer_config
from moemerge.routers import streamed_pass
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.prompts import EncodedPrompt
from moemerge.routers.streamed_pass import capture_router_inputs
from moemerge.sources.model_folder import open_model
from moemerge.sources.tensor_tables import read_tensor_table
from tests.support.families import DENSE
from tests.support.models import VOCAB, load, make_model

IS_V4 = transformers.__version__.startswith("4.")
LENGTHS = (3, 14, 1, 9)


def is_known(model_type: str) -> bool:
    return model_type in transformers.AutoConfig.for_model.__globals__["CONFIG_MAPPING"]


def in_words_of_4(sizes: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 calls the same."""
    sizes = dict(sizes)
    if rope := dict(sizes.pop("rope_parameters", {})):
        sizes |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if "mamba_n_heads" in sizes:
        sizes["layer_types"] = ["mamba" if kind == "linear_attention" else "attention" for kind in sizes["layer_types"]]
    return sizes


def prompts() -> tuple[EncodedPrompt, ...]:
    """One for each expert, of unequal length."""
    generator = torch.Generator().manual_seed(3)
    ids = [tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist()) for length in LENGTHS]
    return tuple(EncodedPrompt(expert, True, tokens, (True,) * len(tokens)) for expert, tokens in enumerate(ids))


def request(folder: Path, layers: tuple[int, ...]) -> PassRequest:
    base = read_dense(json.loads((folder / "config.json").read_text()))
    assert not isinstance(base, str), base
    width = base.sizes["ffn"]
    mixture = Mixture(base.layers, width, (width,) * len(LENGTHS), (), 2, layers, {})
    tensors = read_tensor_table(open_model(str(folder), print), print)
    return PassRequest(
        ModelTensors(base, tensors), mixture, "softmax", prompts(), Compute(torch.device("cpu"), torch.float32)
    )


def ffn_inputs(folder: Path, ffn_module: str, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """What enters each layer's FFN in the whole model: (layer) of (token, hidden)."""
    model, seen = load(folder), []
    for layer in model.model.layers:
        layer.get_submodule(ffn_module).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    return seen


def change_buffers(folder: Path) -> None:
    """Give what a checkpoint holds beside parameters, Gemma 4's scalars, values other than a new model's."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in tensors.items() if name.endswith("layer_scalar")}
    save_file(tensors | changed, folder / "model.safetensors", {"format": "pt"})


def test_every_family_is_tried():
    assert {model_type for model_type, _ in DENSE.values()} == set(DENSE_FAMILIES)


@pytest.mark.parametrize("name", DENSE)
def test_the_pass_sees_what_the_whole_model_sees(tmp_path, name):
    """Prompts of unequal length are padded together, and each is seen as if alone."""
    model_type, sizes = DENSE[name]
    if not is_known(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    folder = make_model(tmp_path / "base", 1, model_type, **(in_words_of_4(sizes) if IS_V4 else sizes))
    change_buffers(folder)
    asked = request(folder, (0, 1, 2))
    expected = [ffn_inputs(folder, asked.base.model.family.ffn_module, prompt.ids) for prompt in asked.prompts]
    seen = 0
    for inputs in capture_router_inputs(asked):
        for expert, layers in enumerate(expected):
            found, states = inputs.states[inputs.expert == expert], layers[inputs.layer]
            assert found.shape == states.shape
            assert (found - states).abs().max() <= 1e-5 * states.abs().max()
        seen += 1
    assert seen == 3
    # In bfloat16, as on a GPU and on CPUs that are faster in it: nearly the same, and no dtype is out of place.
    rounded = capture_router_inputs(replace(asked, compute=Compute(torch.device("cpu"), torch.bfloat16)))
    for inputs in rounded:
        for expert, layers in enumerate(expected):
            found, states = inputs.states[inputs.expert == expert], layers[inputs.layer]
            assert 0 < (found - states).norm() < 0.1 * states.norm()


def test_the_pass_ends_with_the_last_layer_that_has_a_router(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "base", num_hidden_layers=5)
    whole = {inputs.layer: inputs.states.clone() for inputs in capture_router_inputs(request(folder, (0, 1, 2, 3, 4)))}
    read, given = [], streamed_pass.read_parameter
    monkeypatch.setattr(
        streamed_pass,
        "read_parameter",
        lambda module, name, tensor, *rest: (read.append(tensor.name), given(module, name, tensor, *rest)),
    )
    for _ in capture_router_inputs(request(folder, (1, 3))):
        pass
    assert {int(name.split(".")[2]) for name in read} == {0, 1, 2, 3}
    assert not any(name.startswith("model.layers.3.mlp.") for name in read)
    monkeypatch.undo()
    part = {inputs.layer: inputs.states.clone() for inputs in capture_router_inputs(request(folder, (1, 3)))}
    assert list(part) == [1, 3]
    assert all(torch.equal(states, whole[layer]) for layer, states in part.items())


def test_what_stands_in_the_padding_may_be_anything():
    states = torch.ones(2, 4, 3)
    batch = decoder.Batch(states, {}, (4, 2))
    states[1, 2:] = torch.nan
    assert batch.is_finite
    states[1, 1, 0] = -torch.inf
    assert not batch.is_finite


class Sizes(TorchDispatchMode):
    """Keeps the numbers of elements of all tensors that are made on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = [0]

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type == "cpu":
            self.found.append(made.numel())
        return made


def test_a_model_without_weights_takes_no_memory_for_them(tmp_path):
    """Not even while it is made: blocks that are left free between modules make the heap grow with each model."""
    base = read_dense(json.loads((make_model(tmp_path / "base") / "config.json").read_text()))
    with Sizes() as sizes:
        model = decoder.empty_model("llama", base.class_keys, torch.device("cpu"), head=True)
    assert max(sizes.found) < base.config["hidden_size"] ** 2
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_the_memory_of_a_container_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_GROUPS", tmp_path)
    free = device.free_memory(torch.device("cpu"))
    for version, (folder, names, cache) in {
        1: ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
        2: (".", ("memory.max", "memory.current"), "inactive_file"),
    }.items():
        group = tmp_path / str(version) / folder
        group.mkdir(parents=True)
        for name, value in zip(names, ("1000000", "600000"), strict=True):
            (group / name).write_text(f"{value}\n")
        (group / "memory.stat").write_text(f"anon 500000\n{cache} 70000\nactive_file 1\n")
        monkeypatch.setattr(device, "_GROUPS", tmp_path / str(version))
        assert device.free_memory(torch.device("cpu")) == 1000000 - 600000 + 70000
    (tmp_path / "2" / "memory.max").write_text("max\n")
    assert device.free_memory(torch.device("cpu")) > 10**6
    assert free is None or free > 10**6


def test_what_a_class_keeps_in_float32_stays_so_and_nothing_else():
    """Named by whole parts of a path: ernie4_5_moe's `gate` of transformers 4 is no `gate_proj`."""
    keys = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": VOCAB,
        "moe_num_experts": 2, "moe_k": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "moe_layer_start_index": 1,
    }  # fmt: skip
    model = decoder.empty_model("ernie4_5_moe", keys, torch.device("cpu"), head=True, dtype=torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert {name.replace("gate.moe", "moe") for name in kept} == {
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.moe_statics.e_score_correction_bias",
    }


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("it 'b'", 2, 3)),
        ({"a": 1, "b": 2}, {"a": 1}, ("it 'b'", 2, None)),
        ([1, 2, 3], [1, 3, 3], ("it from 1 on", [2, 3], [3, 3])),
        ([1], [1, 2], ("it from 1 on", [], [2])),
        ("left", "right", ("it", "left", "right")),
    ],
)
def test_where_two_tokenizers_differ_first_is_told(found, expected, told):
    assert proving._first("it", found, expected) == told


def test_a_tokenizer_that_reads_no_text_is_no_proof():
    def tokenizer(_text, **_):
        raise ValueError

    tokenizer.all_special_tokens, tokenizer.get_added_vocab = [], dict
    with pytest.raises(ValueError, match="^it reads no text$"):
        proving._texts(tokenizer)


def test_a_tokenizers_config_that_cannot_be_read_is_empty(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert read_tokenizer_config(tmp_path) == {}


def test_only_errors_of_memory_are_told_as_such():
    with pytest.raises(RuntimeError, match="^shapes differ$"), device.memory_watched("it ran"):
        raise RuntimeError("shapes differ")
