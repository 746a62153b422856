"""Text models inside multimodal checkpoints: what mixtures of them compute, against transformers' multimodal classes."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge import load_config, merge, plan_merge
from moemerge.checks.verification import verify_merge
from moemerge.errors import IncompatibleError
from moemerge.evaluation.runnable import open_dense
from moemerge.families.dense import DenseModel, read_dense
from moemerge.families.multimodal import MULTIMODAL
from moemerge.generation.answers import Sampling, open_generator
from moemerge.sources.model_folder import open_model
from moemerge.sources.tensor_tables import read_tensor_tables
from moemerge.sources.text_models import read_text_config
from tests.support.hub_world import files_of, weights_sent
from tests.support.models import SIZES, assert_close, edit_json, load, load_weights, logits, save_weights, write_config
from tests.support.multimodal import KINDS, load_multimodal, make_multimodal

QUICK = {"qwen3_5", "gemma4", "mistral3", "qwen3_vl", "qwen2_vl", "idefics3"}
IS_V4 = transformers.__version__.startswith("4.")
AS_DENSE = {
    "gemma4_unified_text": "gemma4_text",
    "qwen3_vl_text": "qwen3",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
}
AXES = ("mrope_section", "mrope_interleaved")


def make(folder: Path, kind: str, seed: int = 1, **keys) -> Path:
    """Make such a model, if this transformers knows it."""
    for model_type in KINDS[kind][:2]:
        if model_type not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    return make_multimodal(folder, kind, seed, **keys)


def merged(folder: Path, base: Path, experts: list[Path], **keys):
    path = write_config(folder / "merge.yaml", base, experts, **keys)
    plan = plan_merge(load_config(path, allow_identical_experts=True))
    merge(plan, folder / "out")
    return plan, folder / "out"


def text_alone(folder: Path, model: Path) -> Path:
    """Write the text model of a multimodal one as transformers names those alone, by rules of this test's own."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((model / "config.json").read_text())["text_config"]
    config["model_type"] = AS_DENSE.get(config["model_type"], config["model_type"])
    if config["model_type"] != "qwen3_5_text":
        for key in ("rope_parameters", "rope_scaling"):
            config[key] = {k: v for k, v in (config.get(key) or {}).items() if k not in AXES} or None
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_weights(model).items():
        if "lm_head" in name:
            tensors["lm_head.weight"] = tensor
        elif name.startswith("model.language_model."):
            tensors[name.replace("language_model.", "", 1)] = tensor
        elif name.startswith("language_model.model."):
            tensors[name.removeprefix("language_model.")] = tensor
    save_weights(folder, tensors)
    return folder


def add_next_tokens(folder: Path) -> Path:
    """Add tensors as those with which released models predict more than one token."""
    extra = {f"mtp.layers.0.{part}.weight": torch.ones(32) for part in ("input_layernorm", "mlp.up_proj")}
    save_weights(folder, load_weights(folder) | extra)
    return folder


def test_every_class_is_tested_with_every_text_model():
    tested = {(outer, text) for outer, text, _, _ in KINDS.values()}
    # Those with mixtures inside are tested where they are written.
    dense = {outer: kind for outer, kind in MULTIMODAL.items() if not outer.endswith("_moe")}
    assert {outer for outer, _ in tested} == dense.keys()
    # LLaVA and LLaVA-NeXT put the same class around their text models.
    assert {text for _, text in tested} == {text for kind in dense.values() for text in kind.text_types}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_identical_experts_compute_of_text_what_the_multimodal_model_computes(tmp_path, kind, tied):
    base = make(tmp_path / "base", kind, tied=tied)
    plan, out = merged(tmp_path, base, [base] * 3, prompts=False)
    if plan.family.model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {plan.family.model_type}")
    assert_close(logits(load(out)), logits(load_multimodal(base)))
    assert [note for note in plan.notes if "are left out" in note]
    assert not [note for note in plan.notes if "is read as" in note or "is not used" in note]
    found = verify_merge(plan, out)
    assert not found.differences


@pytest.mark.parametrize("kind", ["qwen3_5", "mistral3", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_multimodal_models_in_shards_and_text_models_alone_are_merged_alike(tmp_path, kind):
    """Routers, made by a pass over the base, and tokenizer files included; each expert is stored in another way."""
    models = [make(tmp_path / f"{seed}", kind, seed, shard_bytes=60_000) for seed in range(3)]
    assert len(list(models[0].glob("*.safetensors"))) > 2
    alone = [text_alone(tmp_path / f"text{seed}", model) for seed, model in enumerate(models)]
    add_next_tokens(models[1])
    inside = [models[0], models[1], alone[2]]
    if kind == "qwen3_5":  # which AutoModelForCausalLM reads and saves again with the long names
        AutoModelForCausalLM.from_pretrained(models[2]).save_pretrained(tmp_path / "tuned")
        assert "model.language_model.norm.weight" in load_weights(tmp_path / "tuned")
        shutil.copyfile(models[2] / "tokenizer.json", tmp_path / "tuned" / "tokenizer.json")
        inside[2] = tmp_path / "tuned"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, out = merged(tmp_path / "a", inside[0], inside[1:])
    _, expected = merged(tmp_path / "b", alone[0], alone[1:])
    named = {"README.md", "moemerge_config.yaml"}
    found, wanted = files_of(out), files_of(expected)
    assert {name: found[name] for name in found.keys() - named} == {
        name: wanted[name] for name in wanted.keys() - named
    }


def test_what_is_left_out_is_said_once_with_its_size(tmp_path):
    base = add_next_tokens(make(tmp_path / "base", "qwen3_5"))
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_weights(base)
    others = [tensor for name, tensor in tensors.items() if not name.startswith(("model.language_model.", "lm_head"))]
    size = sum(tensor.nbytes for tensor in others)
    plan = plan_merge(
        load_config(write_config(tmp_path / "m.yaml", base, [other] * 2, prompts=False), allow_identical_experts=True)
    )
    assert [note for note in plan.notes if "left out" in note] == [
        f"{base}, {other}: beside the text model, {len(others)} tensors of {size / 1000:.2f} kB are left out: model.visual, mtp"
    ]
    could = "base_model: `keep_vision: true` would keep its towers, in a qwen3_5_moe (docs/families.md)"
    assert could in plan.notes


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_configs_without_a_text_config_are_read_as_released(tmp_path, kind):
    base = make(tmp_path / "base", kind)
    config = json.loads((base / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("rope_parameters", None)
    flat = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "rope_theta": 1e6}
    text.pop("layer_types", None)
    (base / "config.json").write_text(json.dumps(text | flat | config))
    plan, out = merged(tmp_path, base, [base] * 2, prompts=False)
    assert_close(logits(load(out)), logits(load_multimodal(base)))
    assert not [note for note in plan.notes if "does not use these keys" in note]


@pytest.mark.skipif(IS_V4, reason="transformers 4 reads the text model's key alone, and looks at no file")
@pytest.mark.parametrize("head", [True, False])
def test_where_configs_disagree_on_tied_embeddings_the_file_tells(tmp_path, head):
    """As transformers 5 saves Mistral Small 3.1, whose own config says nothing, and whose class is tied by default."""
    base = make(tmp_path / "base", "mistral3", tied=not head)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    edit_json(base / "config.json", tie_word_embeddings=True, text_config=config["text_config"])
    expected = logits(load_multimodal(base))
    _, out = merged(tmp_path, base, [base] * 2, prompts=False)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is not head
    assert_close(logits(load(out)), expected)


@pytest.mark.parametrize("kind", ["mistral3"])
def test_quantised_text_models_inside_are_dequantised(tmp_path, kind):
    """As Ministral 3 is released: FP8 with one scale for each matrix of the text model, and plain towers."""
    base = make(tmp_path / "base", kind)
    stored = load_weights(base)
    names = [name for name in stored if ".language_model." in f".{name}" and "proj" in name]
    plain, packed = dict(stored), dict(stored)
    for name in names:
        scale = stored[name].abs().max() / 448
        packed[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scale
        plain[name] = packed[name].float() * scale
    save_weights(base, packed)
    edit_json(base / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": None})
    other = shutil.copytree(base, tmp_path / "other")
    save_weights(other, plain)
    edit_json(other / "config.json", quantization_config=None)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found, expected = (
        load_weights(merged(tmp_path / folder, model, [model] * 2, prompts=False, dtype="float32")[1])
        for folder, model in (("a", base), ("b", other))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


NONSENSE = (None, True, 1, 0.5, "x", [], [{}], {}, {"rope_theta": "x"}, {"model_type": []}, 10**400)


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_values_that_make_no_sense_are_refused_with_a_text(model_type):
    text = {**SIZES, "model_type": MULTIMODAL[model_type].text_types[0], "rope_parameters": {"rope_theta": 1e4}}
    outer = {"model_type": model_type, "text_config": text, "vision_config": {}, "tie_word_embeddings": True}
    for value in NONSENSE:
        for config in (
            *({**outer, key: value} for key in outer),
            *({**outer, "text_config": {**text, key: value}} for key in (*text, "rope_scaling", "quantization_config")),
        ):
            found, _ = read_text_config(config, lambda _: None)
            assert isinstance(read_dense(found), str | DenseModel)


def test_sizes_that_the_first_llavas_leave_out_are_those_of_llama():
    from moemerge.families.multimodal import text_config

    found = text_config({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}})
    whole = CONFIG_MAPPING["llava"](text_config={"model_type": "llama", "vocab_size": 32064}).text_config
    assert found == {key: getattr(whole, key) for key in found}
    assert found["num_hidden_layers"] == 32


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_of_a_multimodal_model_is_added_to_the_text_model_inside(tmp_path):
    base = make(tmp_path / "base", "mistral3")
    model = load_multimodal(base)
    targets = r".*language_model.*(gate_proj|up_proj|down_proj)"
    patterns = {"model.language_model.layers.1.mlp.up_proj": 64}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, alpha_pattern=patterns)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "adapter")
    expected = tuned.merge_and_unload().state_dict()
    (tensors,) = read_tensor_tables([open_model(f"{base}+{tmp_path / 'adapter'}", print)], print, dense=True)
    from moemerge.checkpoint.derived import read_values

    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        found = torch.from_numpy(read_values(tensors[name])).reshape(tensors[name].shape)
        assert torch.allclose(found, expected[name.replace("model.", "model.language_model.", 1)], atol=1e-6)


def test_a_multimodal_base_is_run_and_continues_text_as_in_transformers(tmp_path):
    base = make(tmp_path / "base", "qwen3_vl")
    made = open_dense(str(base), "base", print)
    assert made.model_type == "qwen3"
    answer = open_generator(base, device="cpu").generate("The quick brown fox", Sampling(8))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    said = load_multimodal(base).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    whole, before = (tokenizer.decode(part, skip_special_tokens=True) for part in (said[0], ids[0]))
    assert answer.text == whole.removeprefix(before)


def test_vision_towers_on_the_hub_are_not_fetched(world, machine, tmp_path):
    names = ("one", "two", "three")
    for seed, name in enumerate(names):
        model = make(tmp_path / name, "qwen3_vl", seed)
        world.hub.add(f"acme/{name}", files_of(model))
    path = write_config(machine.folder / "merge.yaml", "acme/one", ["acme/two", "acme/three"], gate_mode="random")
    result = machine.moemerge(str(path), "streamed", "--stream", "--quiet")
    assert result.code == 0, result.err
    stored = sum((tmp_path / name / "model.safetensors").stat().st_size for name in names)
    tower = sum(tensor.nbytes for name, tensor in load_weights(tmp_path / "one").items() if ".visual." in name)
    assert weights_sent(world.hub) < stored - 3 * tower
    _, local = merged(tmp_path, tmp_path / "one", [tmp_path / "two", tmp_path / "three"], gate_mode="random")
    found, expected = load_weights(machine.folder / "streamed"), load_weights(local)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_multimodal_models_are_refused_with_those_that_are_read(tmp_path):
    base = make(tmp_path / "base", "mistral3")
    edit_json(base / "config.json", model_type="paligemma")
    path = write_config(tmp_path / "m.yaml", base, [base] * 2, prompts=False)
    with pytest.raises(IncompatibleError) as refusal:
        plan_merge(load_config(path, allow_identical_experts=True))
    assert refusal.value.problems[0] == (
        "base_model: it is multimodal (model_type 'paligemma'), with a text model of type 'mistral'; text models are "
        f"read inside {', '.join(MULTIMODAL)}. The same holds for experts[0] {base}, experts[1] {base}"
    )
