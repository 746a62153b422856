"""Mixtures of transformers' own classes, read from each layout of their checkpoints."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.header import TensorInfo, read_header
from moemerge.errors import CheckpointError
from moemerge.families.in_memory import released_layout
from moemerge.families.layer_names import layer_prefix
from moemerge.families.released import READABLE
from moemerge.families.stored_mixture import StoredMixture
from moemerge.passes.loading import path_in_memory
from moemerge.passes.weights import read_into
from tests.support.mixtures import EXPERTS, PLAINEST, VARIANTS, make_mixture, make_variant, random_mixture
from tests.support.models import load

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 has no stacks of experts in memory"
)
# The plainest of a type, and the one with the most settings.
ENDS = {*PLAINEST.values(), *{model_type: name for name, (model_type, _) in VARIANTS.items()}.values()}
FAMILIES = [pytest.param(name, marks=() if name in ENDS else pytest.mark.slow) for name in VARIANTS]


def values(tensor: TensorInfo) -> torch.Tensor:
    found = torch.empty(tensor.shape)
    if found.numel():
        read_into(tensor, found)
    return found


def stored(folder: Path) -> StoredMixture:
    config = json.loads((folder / "config.json").read_text())
    family = READABLE[config["model_type"]]
    tensors = released_layout(family, read_header(folder / "model.safetensors"))
    return StoredMixture(family, config, tensors, tuple(map(str, range(EXPERTS))))


def modules(model: Any) -> dict[int, Any]:
    """The experts that transformers has in memory, by layer: stacks `gate_up_proj` and `down_proj`."""
    return {
        index: module
        for index, layer in enumerate(model.model.layers)
        for module in layer.modules()
        if getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3
    }


def in_memory(model: Any, mixture: StoredMixture, layer: int, name: str) -> torch.Tensor:
    path, _, own = path_in_memory(model, mixture.path(layer, name)).rpartition(".")
    found = getattr(model.get_submodule(path), own)
    assert isinstance(found, torch.Tensor)
    return found.detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_both_layouts_are_the_same_mixture(tmp_path, name):
    released = stored(make_variant(tmp_path / "released", name))
    memory = stored(make_variant(tmp_path / "memory", name, layout="in_memory"))
    assert released.tensors.keys() == memory.tensors.keys()
    for own, tensor in released.tensors.items():
        assert tensor.name == own
        assert torch.equal(values(tensor), values(memory.tensors[own])), own
    names = read_header(tmp_path / "memory" / "model.safetensors")
    assert all(tensor.name in names for tensor in memory.tensors.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_is_what_the_class_has_in_memory(tmp_path, name):
    folder = make_variant(tmp_path / "made", name)
    model, mixture = load(folder), stored(folder)
    family, experts = mixture.family, modules(model)
    assert mixture.moe_layers == tuple(experts)
    assert (mixture.experts, mixture.experts_per_token, mixture.hidden) == (EXPERTS, 2, model.config.hidden_size)
    for layer, module in experts.items():
        width = module.down_proj.shape[-1]
        assert mixture.expert_width == width
        assert torch.equal(values(mixture.router(layer)), in_memory(model, mixture, layer, family.router))
        for expert in range(EXPERTS):
            parts = {"gate": module.gate_up_proj[expert, :width], "up": module.gate_up_proj[expert, width:]}
            for role, expected in {**parts, "down": module.down_proj[expert]}.items():
                assert torch.equal(values(mixture.projection(layer, expert, role)), expected)
        if family.shared and mixture.shared_projection(layer, "up"):
            for own, roles in family.shared.names.items():
                for role, expected in zip(roles, in_memory(model, mixture, layer, own).chunk(len(roles)), strict=True):
                    assert torch.equal(values(mixture.shared_projection(layer, role)), expected)
    with pytest.raises(KeyError):
        mixture.projection(mixture.moe_layers[0], EXPERTS, "up")


@pytest.mark.parametrize("name", PLAINEST.values())
def test_what_belongs_to_experts_is_theirs_alone(tmp_path, name):
    """An entry of a tensor, or a tensor of a numbered module; the rest of the model has none."""
    mixture = stored(make_variant(tmp_path / "made", name))
    family, layer = mixture.family, mixture.moe_layers[-1]
    separate = {own: roles for own, roles in family.experts.items() if "{expert}" in own}
    for expert in range(EXPERTS):
        assert mixture.of_expert(layer, expert) == {
            own: mixture.layer(layer)[own.format(expert=expert)] for own in separate
        }
    held = mixture.by_expert(layer)
    assert all(tensor.shape[0] == EXPERTS for tensor in held.values())
    vectors = {family.selection_bias, family.weight_factors} - {""}
    assert held.keys() == {family.router, *vectors, *(family.experts.keys() - separate.keys())}
    owned = {own for own in mixture.tensors if mixture.is_expert(own)}
    count = len(separate) * EXPERTS + len(held)
    assert len(owned) == count * len(mixture.moe_layers)
    assert {own for own in mixture.tensors.keys() - owned if re.search(r"\.experts\.", own)} == set()


def test_layers_without_a_router_have_no_experts(tmp_path):
    """Dense layers, and layers whose shared experts are absent."""
    mixture = stored(make_mixture(tmp_path / "made", "deepseek_v3"))
    assert mixture.moe_layers == (1, 2)
    assert mixture.shared_projection(0, "up") is None
    assert not any(mixture.is_expert(name) for name in mixture.tensors if name.startswith(layer_prefix(0)))
    assert stored(make_mixture(tmp_path / "other", "mixtral")).shared_projection(0, "up") is None


def test_what_transformers_saves_is_the_same_mixture(tmp_path):
    """It takes the stacks apart that released checkpoints of this type have, if it did not load the model."""
    folder = make_mixture(tmp_path / "released", "qwen3_5_moe_text")
    random_mixture(AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path / "saved")
    single = [name for name in read_header(tmp_path / "saved" / "model.safetensors") if ".experts.2." in name]
    assert len(single) == 9
    released, saved = stored(folder), stored(tmp_path / "saved")
    assert released.tensors.keys() == saved.tensors.keys()
    for name, tensor in released.tensors.items():
        assert torch.equal(values(tensor), values(saved.tensors[name])), name
    up = saved.projection(1, 2, "up")
    assert torch.equal(values(up), values(released.projection(1, 2, "up")))
    assert [leaf.name for leaf in leaves(up)] == [
        f"model.layers.1.mlp.experts.{expert}.{role}_proj.weight"
        for expert in range(EXPERTS)
        for role in ("gate", "up")
    ]
    file = tmp_path / "saved" / "model.safetensors"
    stack = saved.tensors["model.layers.1.mlp.experts.gate_up_proj"]
    file.write_bytes(file.read_bytes()[: list(leaves(up))[5].start + 10])
    with pytest.raises(CheckpointError) as caught:
        values(stack)
    assert str(caught.value) == f"{file}: ended inside tensor '{stack.name}': was it changed meanwhile?"


def headers(tmp_path: Path, model_type: str, **keys: Any) -> SimpleNamespace:
    family = READABLE[model_type]
    folder = make_mixture(tmp_path / "made", model_type, **keys)
    return SimpleNamespace(family=family, tensors=read_header(folder / "model.safetensors"))


FIRST = "model.layers.0.block_sparse_moe"
ROWS = f"{FIRST}.gate.weight has a row for each of {EXPERTS} experts"
PACKED = (
    "the checkpoint is incomplete, or its experts are packed in a way that is not read. Download it again, or name the "
    "model that it was made from."
)


def test_layouts_are_not_mixed(tmp_path):
    released, memory = headers(tmp_path, "mixtral"), headers(tmp_path, "mixtral", layout="in_memory")
    mixed = {name: tensor for name, tensor in released.tensors.items() if ".layers.0." in name}
    mixed |= {name: tensor for name, tensor in memory.tensors.items() if ".layers.0." not in name}
    with pytest.raises(CheckpointError) as caught:
        released_layout(released.family, mixed)
    assert re.fullmatch(
        r"model\.layers\.0\.block_sparse_moe\.\S+ is named as released checkpoints of mixtral name it, "
        r"model\.layers\.1\.mlp\.\S+ as transformers 5 does in memory: the folder holds parts of two checkpoints\. "
        r"Remove one\.",
        str(caught.value),
    )


def test_stacks_beside_single_experts_are_refused(tmp_path):
    made = headers(tmp_path, "qwen3_5_moe_text")
    random_mixture(AutoConfig.from_pretrained(tmp_path / "made")).save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError) as caught:
        released_layout(made.family, {**made.tensors, **read_header(tmp_path / "saved" / "model.safetensors")})
    assert str(caught.value) == (
        "model.layers.0.mlp.experts.0.gate_proj.weight is there beside model.layers.0.mlp.experts.gate_up_proj, which "
        "holds the same experts: the folder holds parts of two checkpoints. Remove one."
    )


@pytest.mark.parametrize("layout", ["released", "in_memory"])
def test_a_missing_expert_is_named(tmp_path, layout):
    made = headers(tmp_path, "mixtral", layout=layout)
    lost = f"{FIRST}.experts.3.w2.weight" if layout == "released" else "model.layers.0.mlp.experts.down_proj"
    named = lost if layout == "released" else f"{FIRST}.experts.0.w2.weight"
    del made.tensors[lost]
    with pytest.raises(CheckpointError) as caught:
        released_layout(made.family, made.tensors)
    assert str(caught.value) == f"{named} is missing, but {ROWS}: {PACKED}"


def test_experts_without_a_row_are_refused(tmp_path):
    made = headers(tmp_path, "mixtral")
    extra = f"{FIRST}.experts.{EXPERTS}.w1.weight"
    made.tensors[extra] = made.tensors[f"{FIRST}.experts.0.w1.weight"]
    with pytest.raises(CheckpointError) as caught:
        released_layout(made.family, made.tensors)
    assert str(caught.value) == (
        f"{extra} is there, but {ROWS}: the checkpoint is not what it says. Download it again."
    )


def test_a_stack_of_another_shape_is_refused(tmp_path):
    made = headers(tmp_path, "granitemoe")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    made.tensors[name] = made.tensors[name].rows(0, 3)
    with pytest.raises(CheckpointError) as caught:
        released_layout(made.family, made.tensors)
    shape = list(made.tensors[name].shape)
    assert str(caught.value) == (
        f"{name} has the shape {shape}, but model.layers.0.block_sparse_moe.router.layer.weight has a row for each of "
        f"{EXPERTS} experts: {PACKED}"
    )
    memory = headers(tmp_path, "mixtral", layout="in_memory")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensor = memory.tensors[name]
    flat = (tensor.shape[0], tensor.shape[1] * tensor.shape[2])
    memory.tensors[name] = replace(tensor, shape=flat)
    with pytest.raises(CheckpointError) as caught:
        released_layout(memory.family, memory.tensors)
    assert str(caught.value) == (
        f"{name}: a stack of experts has a shape (expert, row, column), with as many rows for each of gate, up; found "
        f"{list(flat)}."
    )
