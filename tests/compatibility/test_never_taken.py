"""What a merge never takes of a model must not block it: it is left out with a note."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from moemerge import load_config, merge, plan_merge
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.evaluation.runnable import open_dense
from moemerge.sources.quantised.table import METHODS
from tests.support.models import edit_json, load_weights, save_weights, write_config

FFN = "model.layers.1.mlp.up_proj"


@pytest.fixture
def models(tmp_path, llamas) -> list[Path]:
    return [Path(shutil.copytree(llama, tmp_path / llama.name)) for llama in llamas[:3]]


def plan_of(tmp_path, models, **keys):
    keys = {"experts_per_token": 1, **keys}
    return plan_merge(load_config(write_config(tmp_path / "c.yaml", models[0], models[1:], prompts=False, **keys)))


def change(folder: Path, **added: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in added.items()}
    save_file(tensors, file, {"format": "pt"})


def rename(folder: Path, new_name) -> None:
    file = folder / "model.safetensors"
    save_file({new_name(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def same_weights(tmp_path, plan, expected) -> bool:
    merge(plan, tmp_path / "out")
    merge(expected, tmp_path / "expected")
    found, wanted = (load_weights(tmp_path / name) for name in ("out", "expected"))
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


EXPERT_EXTRAS = {
    "score.weight": (2, 32),
    "v_head.summary.bias": (1,),
    "vision_tower.patch.weight": (4, 4),
    "model.layers.0.self_attn.k_scale": (1,),
    "model.layers.0.self_attn.k_proj.v_scale": (1,),
    "model.layers.2.self_attn.rotary_emb.cos_cached": (16, 8),
    "model.rotary_emb.sin_cached": (16, 8),
    "model.layers.1.self_attn.q_proj.bias": (32,),
}


@pytest.mark.parametrize("name", EXPERT_EXTRAS)
def test_what_an_expert_has_beside_its_ffns_is_left_out(tmp_path, llamas, models, name):
    change(models[1], **{name: torch.ones(EXPERT_EXTRAS[name])})
    plan = plan_of(tmp_path, models)
    assert plan.notes == (f"experts[0] {models[1]}: tensor {name} is not used by the mixture",)
    assert same_weights(tmp_path, plan, plan_of(tmp_path, llamas[:3]))


@pytest.mark.parametrize(
    "name",
    [
        f"{FFN}.bias",
        f"{FFN}.weight_scale",
        "model.layers.1.post_feedforward_layernorm.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.1.adapter.weight",
    ],
)
def test_what_changes_an_ffn_or_is_a_layer_more_is_refused(tmp_path, models, name):
    change(models[1], **{name: torch.ones(1)})
    with pytest.raises(IncompatibleError, match=f"tensor {re.escape(name)} has no place in a merge"):
        plan_of(tmp_path, models)


def test_with_mixed_attention_what_belongs_to_it_is_refused(tmp_path, models):
    change(models[1], **{"model.layers.0.self_attn.k_scale": torch.ones(1)})
    plan_of(tmp_path, models, shared_weights="average")
    change(models[1], **{"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(IncompatibleError, match=r"tensor model.layers.0.self_attn.q_proj.bias has no place"):
        plan_of(tmp_path, models, shared_weights="average")


def test_of_a_base_only_other_heads_and_buffers_are_left_out(tmp_path, llamas, models):
    change(models[0], **{"score.weight": torch.ones(2, 32), "model.layers.0.self_attn.k_scale": torch.ones(1)})
    plan = plan_of(tmp_path, models)
    assert plan.notes == (
        "base_model: tensor model.layers.0.self_attn.k_scale is not used by the mixture (and 1 more)",
    )
    assert same_weights(tmp_path, plan, plan_of(tmp_path, llamas[:3]))
    change(models[0], **{"lm_head.bias": torch.ones(160)})
    with pytest.raises(IncompatibleError, match=r"base_model: tensor lm_head.bias has no place"):
        plan_of(tmp_path, models)


@pytest.mark.parametrize(
    ("wrap", "example"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod.lm_head.weight is read as lm_head.weight"),
        (lambda name: f"base_model.model.{name}", "base_model.model.lm_head.weight is read as lm_head.weight"),
        (lambda name: f"model.{name}", "model.lm_head.weight is read as lm_head.weight"),
        (
            lambda name: f"_forward_module.policy.{name}",
            "_forward_module.policy.lm_head.weight is read as lm_head.weight",
        ),
        (lambda name: f"module._orig_mod.{name}", "module._orig_mod.lm_head.weight is read as lm_head.weight"),
        (
            lambda name: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", name),
            "model.layers.0._orig_mod.input_layernorm.weight is read as model.layers.0.input_layernorm.weight",
        ),
        (lambda name: name.removeprefix("model."), "embed_tokens.weight is read as model.embed_tokens.weight"),
    ],
)
def test_names_are_read_without_what_the_model_was_wrapped_in(tmp_path, llamas, models, wrap, example):
    for model in models:
        rename(model, wrap)
    plan = plan_of(tmp_path, models)
    assert plan.notes == tuple(f"{model}: its tensor {example}, and others likewise" for model in models)
    assert same_weights(tmp_path, plan, plan_of(tmp_path, llamas[:3]))
    assert open_dense(str(models[1]), "x", print).shapes == open_dense(str(llamas[1]), "x", print).shapes
    change(models[1], **{"model.norm.weight": torch.ones(32), "_orig_mod.model.norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match="would both be called"):
        plan_of(tmp_path, models)


def test_a_body_that_was_saved_alone_serves_as_an_expert_but_not_as_a_base(tmp_path, llamas, models):
    for model in models[1:]:
        AutoModel.from_pretrained(model).save_pretrained(model)
    assert "layers.0.mlp.up_proj.weight" in load_weights(models[1])
    assert same_weights(tmp_path, plan_of(tmp_path, models), plan_of(tmp_path, llamas[:3]))
    AutoModel.from_pretrained(models[0]).save_pretrained(models[0])
    with pytest.raises(IncompatibleError, match=r"base_model: tensor lm_head.weight is missing"):
        plan_of(tmp_path, models)


def test_words_of_a_quantisation_that_the_weights_do_not_have_are_stale(tmp_path, llamas, models):
    edit_json(models[1] / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    plan = plan_of(tmp_path, models)
    assert plan.notes == (
        f"experts[0] {models[1]}: its config.json speaks of quantisation (bitsandbytes), but what is taken of it is stored "
        "as plain numbers without scales, and is merged as such",
    )
    assert same_weights(tmp_path, plan, plan_of(tmp_path, llamas[:3]))


@pytest.mark.parametrize("kind", ["hqq", "scales beside plain weights"])
def test_a_quantised_expert_of_an_unknown_method_is_refused(tmp_path, models, kind):
    tensors = load_weights(models[1])
    if kind == "hqq":
        del tensors[f"{FFN}.weight"]
        tensors[f"{FFN}.W_q"] = torch.ones(4, 48, dtype=torch.int32)
    else:
        tensors[f"{FFN}.weight_scale"] = torch.ones(48, 1)
    save_weights(models[1], tensors)
    edit_json(models[1] / "config.json", quantization_config={"quant_method": kind[:4]})
    with pytest.raises(IncompatibleError) as refused:
        plan_of(tmp_path, models)
    shown_by = {
        "hqq": f"tensor {FFN}.weight is missing",
        "scales beside plain weights": f"tensor {FFN}.weight_scale has no place in a merge",
    }[kind]
    assert refused.value.problems == (
        f"experts[0] {models[1]}: is quantised ({kind[:4]}), and of the methods of quantisation {', '.join(METHODS)} "
        f"alone are read: {shown_by}. Use the original weights, or dequantise it",
    )


@pytest.mark.parametrize("method", ["fp8", "hqq"])
def test_what_else_is_wrong_with_a_model_that_speaks_of_quantisation_is_told(tmp_path, models, method):
    tensors, other = load_weights(models[1]), FFN.replace("layers.1", "layers.0")
    del tensors[f"{FFN}.weight"]
    rows, columns = tensors[f"{other}.weight"].shape
    tensors[f"{other}.weight"] = tensors[f"{other}.weight"][1:].clone()
    save_weights(models[1], tensors)
    edit_json(models[1] / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(IncompatibleError) as refused:
        plan_of(tmp_path, models)
    missing = {
        "fp8": f"tensor {FFN}.weight is missing",
        "hqq": f"is quantised (hqq), and of the methods of quantisation {', '.join(METHODS)} alone are read: tensor "
        f"{FFN}.weight is missing. Use the original weights, or dequantise it",
    }[method]
    assert refused.value.problems == (
        f"experts[0] {models[1]}: {missing}",
        f"experts[0] {models[1]}: tensor {other}.weight (expected [{rows}, {columns}], found [{rows - 1}, {columns}]) has "
        "another shape than config.json says",
    )


def test_another_name_of_the_same_activation_is_the_same(tmp_path, llamas, models):
    edit_json(models[2] / "config.json", hidden_act="swish")
    plan = plan_of(tmp_path, models)
    assert plan.notes == (f"experts[1] {models[2]}: hidden_act 'swish' is another name of 'silu'",)
    assert same_weights(tmp_path, plan, plan_of(tmp_path, llamas[:3]))
    edit_json(models[0] / "config.json", hidden_act="swish")
    assert plan_of(tmp_path, models).output_config["hidden_act"] == "silu"
    tokens = torch.tensor([[3, 4, 5]])
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits for folder in (models[0], llamas[0])
    )
    assert torch.equal(one, other)


def test_links_of_a_users_own_are_followed(tmp_path, llamas, models):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in models[1].iterdir():
        (linked / path.name).symlink_to(path)
    plan = plan_of(tmp_path, [models[0], linked, models[2]])
    assert same_weights(tmp_path, plan, plan_of(tmp_path, llamas[:3]))


def test_a_pipe_in_a_source_is_never_waited_for(tmp_path, models):
    import os

    os.mkfifo(models[1] / "README.md")
    merge(plan_of(tmp_path, models), tmp_path / "out")
    (models[0] / "generation_config.json").unlink()
    os.mkfifo(models[0] / "generation_config.json")
    with pytest.raises(CheckpointError, match=r"generation_config.json: is not a regular file"):
        plan_of(tmp_path, models)


def test_a_stale_word_of_a_new_kind_is_no_crash(tmp_path, models):
    for value in ("awq", 4, ["x"], {"quant_method": ["a"]}):
        edit_json(models[1] / "config.json", quantization_config=value)
        assert "speaks of quantisation" in plan_of(tmp_path, models).notes[0]
