"""The dense models that experts of mixtures are, in transformers' classes beside those that the mixtures were made of."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.derived import read_values
from moemerge.editing.dense.densifying import averaged, equal_weights
from moemerge.errors import IncompatibleError
from moemerge.families.dense import DENSE_FAMILIES
from moemerge.families.expert_view import Chosen, DenseView, dense_view
from moemerge.families.stored_mixture import StoredMixture
from moemerge.sources.model_folder import open_merged
from moemerge.sources.stored_mixtures import read_stored_mixture
from tests.families.test_families import PAIRS, PLAINEST, dense, merged, pairs, parts, readable  # noqa: F401  a fixture
from tests.support.families import DENSE
from tests.support.mixtures import make_mixture
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


def stored(folder: Path) -> StoredMixture:
    return read_stored_mixture(open_merged(folder), lambda _: None)


def written(view: DenseView, folder: Path) -> Path:
    """Write a view of float32 tensors as a checkpoint."""
    folder.mkdir()
    tensors = {name: torch.from_numpy(read_values(tensor)) for name, tensor in view.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(view.config))
    return folder


def with_ffns_of(base: Path, expert: Path, layers=(0, 1, 2)):
    """The base as transformers computes it, with another model's FFN modules."""
    model, other = load(base), load(expert)
    module = DENSE_FAMILIES[model.config.model_type].ffn_module
    for layer in layers:
        model.model.layers[layer].set_submodule(module, other.model.layers[layer].get_submodule(module))
    return model


def as_wide(matrix: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The matrix with zeros beside it and below it, where another one is larger."""
    rows, columns = (theirs - own for own, theirs in zip(matrix.shape, other.shape, strict=True))
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows))


def first_of_each_family() -> list:
    """Of each output family one pair; but for a few, by `make test-all`."""
    first = {moe: name for name, moe in reversed(PAIRS)}
    quick = {"mixtral", "granitemoehybrid", "glm4_moe", "gemma4_text"}
    return [pytest.param(name, moe, marks=() if moe in quick else pytest.mark.slow) for moe, name in first.items()]


@pytest.mark.parametrize(("name", "moe"), parts(PAIRS))
def test_an_expert_computes_what_the_dense_model_did(tmp_path, dense, name, moe):  # noqa: F811
    readable(name, moe)
    base, *experts = dense(name)[:3]
    _, out = merged(tmp_path, base, experts, architecture=moe)
    view = dense_view(stored(out), 1)
    assert view.notes == ()
    found = written(view, tmp_path / "view")
    assert_close(logits(load(found)), logits(with_ffns_of(base, experts[1])))
    if view.model.family.model_type == DENSE[name][0]:
        ours, theirs, ffns = (load_file(folder / "model.safetensors") for folder in (found, base, experts[1]))
        module = f".{view.model.family.ffn_module}."
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(tensor, as_wide(ffns[key], tensor) if module in key else theirs[key])
            for key, tensor in ours.items()
        )


@pytest.mark.parametrize(("name", "moe"), first_of_each_family())
def test_a_config_that_transformers_saved_again_says_the_same(tmp_path, dense, name, moe):  # noqa: F811
    readable(name, moe)
    base, *experts = dense(name)[:3]
    _, out = merged(tmp_path, base, experts, architecture=moe)
    released = dense_view(stored(out), 0)
    kept = json.loads((out / "config.json").read_text())
    AutoConfig.from_pretrained(out).save_pretrained(out)
    saved = json.loads((out / "config.json").read_text())
    assert saved != kept
    again = dense_view(stored(out), 0)
    assert again.model.family == released.model.family
    assert again.model.values == released.model.values


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST, shared=1)))
def test_a_shared_expert_is_what_it_adds(tmp_path, dense, name, moe):  # noqa: F811
    readable(name, moe)
    base, first, second, shared = dense(name)[:4]
    asked = [{"source_model": str(shared), "residual_scale": 1.0}]
    _, out = merged(tmp_path, base, [first, second], architecture=moe, shared_experts=asked)
    mixture = stored(out)
    if mixture.family.appends_shared:
        with pytest.raises(IncompatibleError, match="it has no shared expert"):
            dense_view(mixture, "shared")
        return
    found = written(dense_view(mixture, "shared"), tmp_path / "view")
    assert_close(logits(load(found)), logits(with_ffns_of(base, shared)))
    assert dense_view(mixture, 0).notes == ("the mixture adds a shared expert to expert 0, which is left out",)


@pytest.mark.parametrize(("name", "moe"), parts(pairs(PLAINEST, moe_layers=(1, 2))))
def test_layers_that_are_dense_stay_as_they_are(tmp_path, dense, name, moe):  # noqa: F811
    readable(name, moe)
    base, *experts = dense(name)[:3]
    _, out = merged(tmp_path, base, experts, architecture=moe, moe_layers="1-")
    found = written(dense_view(stored(out), 1), tmp_path / "view")
    assert_close(logits(load(found)), logits(with_ffns_of(base, experts[1], layers=(1, 2))))


def made(tmp_path: Path, model_type: str, architecture: str, sizes=None, **keys) -> Path:
    base, *experts = [make_model(tmp_path / str(seed), seed, model_type, **(sizes or {})) for seed in range(3)]
    return merged(tmp_path, base, experts, architecture=architecture, **keys)[1]


def refusal(out: Path, expert: Chosen = 1) -> str:
    with pytest.raises(IncompatibleError) as error:
        dense_view(stored(out), expert)
    return str(error.value)


HEAD = "There is no dense model that computes like expert 1 of this mixture:"


def test_a_factor_on_the_experts_multiplies_the_down_projection(tmp_path):
    out = made(tmp_path, "llama", "glm4_moe")
    plain = dense_view(stored(out), 1).tensors
    edit_json(out / "config.json", routed_scaling_factor=2.5)
    scaled = dense_view(stored(out), 1).tensors
    for name, tensor in plain.items():
        factor = 2.5 if "down_proj" in name else 1
        assert (read_values(scaled[name]) == factor * read_values(tensor)).all()


def test_a_factor_that_the_class_does_not_read_is_none(tmp_path):
    out = make_mixture(tmp_path / "mixture", "mixtral")
    plain = dense_view(stored(out), 1).tensors["model.layers.1.mlp.down_proj.weight"]
    edit_json(out / "config.json", routed_scaling_factor=2.5)
    given = dense_view(stored(out), 1).tensors["model.layers.1.mlp.down_proj.weight"]
    assert (read_values(given) == read_values(plain)).all()


def test_the_factor_is_that_of_the_class_where_no_key_says_it(tmp_path, dense):  # noqa: F811
    readable("qwen3", "exaone_moe")
    base, *experts = dense("qwen3")[:3]
    _, out = merged(tmp_path, base, experts, architecture="exaone_moe")
    edit_json(out / "config.json", routed_scaling_factor=None)
    factor = AutoConfig.for_model("exaone_moe").routed_scaling_factor
    found = load_file(written(dense_view(stored(out), 1), tmp_path / "view") / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found[name], load_file(experts[1] / "model.safetensors")[name] * factor)


@pytest.mark.parametrize("given", [False, None])
def test_weights_that_do_not_add_up_to_one_are_refused(tmp_path, given):
    out = made(tmp_path, "qwen3", "qwen3_moe", {"head_dim": 16})
    edit_json(out / "config.json", norm_topk_prob=given)
    assert refusal(out) == (
        f"{HEAD}\n  - its norm_topk_prob is False, expected True: the weights of the chosen experts do not add up to 1, so "
        "that no expert has a size of its own"
    )


def test_heads_that_rotate_in_part_beside_biases_are_those_of_a_glm(tmp_path):
    base = make_model(tmp_path / "base", 0, "qwen2")
    _, out = merged(tmp_path, base, [base] * 2, architecture="glm4_moe")
    config = json.loads((out / "config.json").read_text())
    rope = config["rope_parameters"] | {"partial_rotary_factor": 0.5}
    edit_json(out / "config.json", partial_rotary_factor=0.5, rope_parameters=rope)
    view = dense_view(stored(out), 1)
    assert view.model.family.model_type == "glm"
    assert_close(logits(load(written(view, tmp_path / "view"))), logits(load(out)))


def test_a_tensor_without_a_place_is_refused(tmp_path):
    out = made(tmp_path, "llama", "mixtral")
    tensors = load_weights(out)
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(8)
    save_weights(out, tensors)
    assert refusal(out).startswith(
        f"{HEAD}\n  - llama: it has no place for tensor model.layers.1.self_attn.q_norm.weight\n"
    )


def test_an_extra_tensor_that_does_something_is_no_longer_left_out(tmp_path):
    out = made(tmp_path, "llama", "qwen2_moe")
    assert dense_view(stored(out), 1).model.family.model_type == "llama"
    tensors = load_weights(out)
    tensors["model.layers.2.self_attn.k_proj.bias"][3] = 0.5
    save_weights(out, tensors)
    view = dense_view(stored(out), 1)
    assert view.model.family.model_type == "qwen2"
    assert read_values(view.tensors["model.layers.2.self_attn.k_proj.bias"])[3] == 0.5


def test_an_expert_that_a_layer_lacks_has_no_dense_model(tmp_path):
    base, *models = [make_model(tmp_path / str(seed), seed) for seed in range(4)]
    path = write_config(tmp_path / "merge.yaml", base, models, prompts=False, architecture="glm4_moe")
    document = yaml.safe_load(path.read_text())
    document["experts"][1]["layers"] = "0-1"
    path.write_text(yaml.safe_dump(document))
    merge(plan_merge(load_config(path)), out := tmp_path / "out")
    assert refusal(out) == f"{HEAD}\n  - it is switched off in layer 2, which has no FFN of it"
    assert dense_view(stored(out), 2).model.family.model_type == "llama"


def test_a_dense_layer_of_another_width_is_refused(tmp_path):
    base = make_model(tmp_path / "base", 0)
    experts = [make_model(tmp_path / str(seed), seed, intermediate_size=32) for seed in (1, 2)]
    _, out = merged(tmp_path, base, experts, architecture="glm4_moe", moe_layers="1-")
    assert refusal(out) == f"{HEAD}\n  - layer 0 is dense, with 48 neurons; the FFNs of the other layers would have 32"


def test_a_gate_of_its_own_is_no_dense_model(tmp_path):
    base, *experts = [make_model(tmp_path / str(seed), seed) for seed in range(3)]
    shared = [{"source_model": str(base)}]
    _, out = merged(tmp_path, base, experts, architecture="qwen2_moe", shared_experts=shared)
    tensors = load_weights(out)
    tensors["model.layers.0.mlp.shared_expert_gate.weight"][0, 0] = 0.1
    save_weights(out, tensors)
    assert refusal(out, "shared") == (
        "There is no dense model that computes like the shared expert of this mixture:\n"
        "  - its gate (mlp.shared_expert_gate.weight) weighs it anew for each token"
    )


def test_what_is_not_there_is_named(tmp_path):
    out = made(tmp_path, "llama", "glm4_moe")
    assert refusal(out, 2) == f"{HEAD.replace('expert 1', 'expert 2')}\n  - it has experts 0 to 1"
    assert refusal(out, "shared").endswith("\n  - it has no shared expert")
    edit_json(out / "config.json", rms_norm_eps=None, quantization_config={"quant_method": "hqq"})
    assert refusal(out) == (
        f"{HEAD}\n  - its config.json has no rms_norm_eps\n  - it is quantised; use the original weights, or dequantise it"
    )


def test_layers_that_predict_further_tokens_are_left_out_with_a_note(tmp_path):
    out = made(tmp_path, "llama", "glm4_moe")
    tensors = load_weights(out)
    tensors |= {name.replace(".2.", ".3.", 1): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    save_weights(out, tensors)
    view = dense_view(stored(out), 1)
    assert view.notes == ("1 layers that predict further tokens are left out",)
    assert not any(".layers.3." in name for name in view.tensors)


def test_tensors_outside_the_layers_that_a_dense_model_lacks_are_named(tmp_path):
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    derived = "model.rotary_emb.inv_freq"
    more = {"mtp.fc.weight": torch.ones(4, 8), "value_head.bias": torch.ones(3), derived: torch.ones(4)}
    save_weights(folder, load_weights(folder) | more)
    mixture = stored(folder)
    told = (
        "2 tensors outside the layers are left out, 140 B, which the dense model's class does not read: "
        "mtp.fc.weight and 1 more"
    )
    view = dense_view(mixture, 0)
    assert view.notes == (told,)
    assert not view.tensors.keys() & more.keys()
    assert averaged(mixture, equal_weights(mixture)).notes == (told,)
    save_weights(folder, load_weights(make_mixture(tmp_path / "plain", "mixtral")))
    assert dense_view(stored(folder), 0).notes == ()
