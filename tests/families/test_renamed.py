"""Models whose own code computes a known dense model under other names, against that code's arithmetic."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge.checks.verification import verify_merge
from moemerge.config.loading import load_config
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.evaluation.losses import token_losses
from moemerge.evaluation.runnable import open_dense
from moemerge.evaluation.running import run_model
from moemerge.families.dense import RENAMED, DenseModel, read_dense
from moemerge.merging.merger import merge
from moemerge.passes.compute_dtype import Compute
from moemerge.passes.tokens import Window
from moemerge.planning.plan import MergePlan
from moemerge.planning.planner import plan_merge
from tests.families.test_dense import NONSENSE, use
from tests.support.families import stored
from tests.support.hub_world import files_of
from tests.support.models import (
    assert_close,
    edit_json,
    load,
    logits,
    make_model,
    save_weights,
    token_ids,
    write_config,
)
from tests.support.renamed import RELEASES, Release, layer_of, logits_of, make_release, read_release

ROOT = Path(__file__).parents[2]
# One of each way of storing; the others repeat them.
WAYS = [
    pytest.param(kind, marks=() if kind in {"internlm2", "baichuan 2", "qwen", "chatglm"} else pytest.mark.slow)
    for kind in RELEASES
]


def merged(tmp_path, base, experts, **keys) -> MergePlan:
    path = write_config(tmp_path / "merge.yaml", base, experts, **keys)
    plan = plan_merge(load_config(path, allow_identical_experts=True))
    merge(plan, tmp_path / "out")
    return plan


def mixture_of(plan: MergePlan, release: Release, out, experts):
    """FFNs of all experts behind the routers that were written, by their definition."""
    tensors, models = stored(out), [read_release(folder) for folder in experts]

    def ffn(layer: int, states: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.{layer}."
        rows = states @ tensors[prefix + plan.family.router].T
        scores = rows.softmax(-1) if plan.family.scoring == "softmax" else rows.sigmoid()
        index = (
            (scores + tensors.get(prefix + plan.family.selection_bias, 0)).topk(plan.config.experts_per_token).indices
        )
        weights = torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index))
        weights = weights / weights.sum(-1, keepdim=True)
        outputs = [release.ffn(layer_of(release, model, layer), states) for model in models]
        return torch.stack([weights[..., [number]] * output for number, output in enumerate(outputs)]).sum(0)

    return ffn


@pytest.mark.parametrize("kind", RELEASES)
def test_equal_experts_compute_what_the_released_code_does(tmp_path, kind):
    release = RELEASES[kind]
    base = make_release(tmp_path / "base", release)
    plan = merged(tmp_path, base, [base] * 3, prompts=False)
    assert_close(logits(load(tmp_path / "out")), logits_of(release, read_release(base), token_ids()))
    assert not verify_merge(plan, tmp_path / "out").differences


@pytest.mark.parametrize("kind", WAYS)
def test_routers_from_prompts_choose_between_other_models(tmp_path, kind):
    release = RELEASES[kind]
    base, *experts = (make_release(tmp_path / name, release, seed) for seed, name in enumerate("abcd"))
    plan = merged(tmp_path, base, experts)
    ffn = mixture_of(plan, release, tmp_path / "out", experts)
    assert_close(logits(load(tmp_path / "out")), logits_of(release, read_release(base), token_ids(), ffn))


@pytest.mark.parametrize("kind", WAYS)
def test_the_base_itself_is_run_as_its_code_does(tmp_path, kind):
    release = RELEASES[kind]
    base = make_release(tmp_path / "base", release)
    ids = token_ids()
    windows = [Window(number, tuple(row), (True,) * len(row)) for number, row in enumerate(ids.tolist())]
    found = run_model(open_dense(str(base), "base", print), windows, Compute(torch.device("cpu"), torch.float32))
    expected = [
        token_losses(window, row)
        for window, row in zip(windows, logits_of(release, read_release(base), ids), strict=True)
    ]
    assert torch.allclose(found.float(), torch.stack([losses.sum() for losses in expected]), rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("aquila", {}),
        ("xverse", {"num_key_value_heads": 4}),
        ("iquestcoder", {"head_dim": 12}),
        ("internlm3", {"head_dim": 12, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}),
    ],
)
def test_copies_of_llama_under_another_type_are_llamas(tmp_path, model_type, sizes):
    """By transformers' class of that type where it has one, and by Llama's."""
    known = model_type if model_type in CONFIG_MAPPING else "llama"
    base = make_model(tmp_path / "base", 0, known, **sizes)
    expected = logits(load(base))
    edit_json(base / "config.json", model_type=model_type)
    merged(tmp_path, base, [base] * 3, prompts=False)
    assert_close(logits(load(tmp_path / "out")), expected)
    edit_json(base / "config.json", model_type="llama")
    assert_close(logits(load(base)), expected)


def test_an_adapter_names_the_modules_of_the_released_code(tmp_path):
    """One of its tensors is split only after the adapter has changed it."""
    release = RELEASES["internlm2"]
    base = make_release(tmp_path / "base", release)
    tensors, factors = read_release(base), {}
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("w1.weight", "w2.weight", "wqkv.weight"))]:
        rows, width = tensors[name].shape
        a, b = (0.3 * torch.randn(shape, generator=generator) for shape in ((4, width), (rows, 4)))
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        tensors[name] = tensors[name] + 2 * b @ a
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "wqkv"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    merged(tmp_path, f"{base}+{adapter}", [f"{base}+{adapter}"] * 2, prompts=False)
    assert_close(logits(load(tmp_path / "out")), logits_of(release, tensors, token_ids()))


def test_quantised_tensors_have_released_names_too(tmp_path):
    release = RELEASES["internlm2"]
    base = make_release(tmp_path / "base", release)
    tensors, narrow = read_release(base), {}
    for name in [name for name, tensor in tensors.items() if tensor.dim() > 1 and "layers" in name]:
        scale = tensors[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
        narrow[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        narrow[f"{name}_scale_inv"] = scale.reshape(1, 1)
        tensors[name] = narrow[name].float() * scale
    save_weights(base, tensors | narrow)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(base / "config.json", quantization_config=settings, torch_dtype="float32")
    merged(tmp_path, base, [base] * 2, prompts=False)
    assert_close(logits(load(tmp_path / "out")), logits_of(release, tensors, token_ids()))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("internlm2", "its model_type internlm2 is read as llama, without code of its own"),
        (
            "mimo",
            "its model_type mimo is read as qwen2, without code of its own; model.mtp_layers.* (14.34 kB), which "
            "predicts further tokens, is left out",
        ),
        (
            "baichuan 2",
            "its model_type baichuan is read as llama, without code of its own; each row of its head is divided by its "
            "length (NormHead)",
        ),
        (
            "qwen",
            "its model_type qwen is read as qwen2, without code of its own; beyond 64 tokens its own code scales "
            "positions and queries by the length (use_dynamic_ntk, use_logn_attn), which no output family does",
        ),
    ],
)
def test_a_plan_says_how_a_model_is_read(tmp_path, kind, said):
    base, expert = (make_release(tmp_path / name, RELEASES[kind], seed) for seed, name in enumerate("ab"))
    plan = plan_merge(load_config(write_config(tmp_path / "merge.yaml", base, [expert, base], prompts=False)))
    found = [note for note in plan.notes if "is read as" in note]
    assert all(note.endswith(f": {said}") for note in found)
    assert all(any(str(folder) in note for note in found) for folder in (base, expert))
    assert not [note for note in plan.notes if "does not use these keys" in note]


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        (
            "baichuan",
            {"max_position_embeddings": None, "model_max_length": 4096},
            "its positions are ALiBi's, as in Baichuan 13B, and every output family has rotary ones",
        ),
        (
            "baichuan",
            {"num_attention_heads": 40},
            "its positions are ALiBi's, as in Baichuan 13B, and every output family has rotary ones",
        ),
        ("qwen", {"no_bias": False}, "its no_bias is False, which no released Qwen has and was not proved"),
        ("qwen", {"rotary_pct": 0.5}, "its rotary_pct is 0.5, which no released Qwen has and was not proved"),
        ("mimo", {"use_mrope": True}, "its use_mrope was not proved"),
        (
            "chatglm",
            {"ffn_hidden_size": None, "inner_hidden_size": 48, "position_encoding_2d": True},
            "it is of ChatGLM's first generation, which reads a prompt in both directions",
        ),
        ("chatglm", {"rmsnorm": False}, "its rmsnorm is False, with which it is no GLM"),
        (
            "chatglm",
            {"padded_vocab_size": 65024, "rope_ratio": 16},
            "its rope_ratio is 16, by which ChatGLM2 divides positions and ChatGLM3 multiplies the base of its rotary "
            "frequencies; which of them it is, its config.json does not say",
        ),
        ("minicpm", {"num_experts": 8}, "num_experts is 8: it has experts already"),
        (
            "minicpm",
            {"sparse_config": {"topk": 64}},
            "sparse_config: it attends to parts of long texts; without this key in config.json it attends to all of them, "
            "and can be merged",
        ),
        (
            "internlm",
            {"rotary": {"base": 10000, "type": "other"}},
            "its rope type is 'other'; known: default, linear, dynamic, yarn, longrope, llama3",
        ),
        (
            "Yi",
            {"model_type": "iquestcoder", "clip_qkv": 8.0},
            "its clip_qkv is 8.0, which transformers does not compute either",
        ),
        (
            "Yi",
            {"model_type": "internlm3", "qkv_bias": True},
            "its qkv_bias differs from its bias, which transformers does not compute either",
        ),
    ],
)
def test_what_no_dense_family_computes_is_refused(kind, keys, said):
    config = RELEASES[kind].config | keys
    assert read_dense({key: value for key, value in config.items() if value is not None}) == said


@pytest.mark.parametrize("kind", RELEASES)
def test_values_that_make_no_sense_are_refused_with_a_text(kind):
    config: dict[str, Any] = RELEASES[kind].config
    renamed = RENAMED[config["model_type"]]
    assert isinstance(read_dense(config), DenseModel)
    for key in {*config, *renamed.defaults, *renamed.silent}:
        for value in NONSENSE:
            model = read_dense({**config, key: value})
            if isinstance(model, DenseModel):
                use(model)
            else:
                assert isinstance(model, str)
                assert model


def test_fused_tensors_have_the_rows_that_the_config_says(tmp_path):
    base = make_release(tmp_path / "base", RELEASES["internlm2"])
    shard = base / "model-00001-of-00002.safetensors"
    fused = {name: tensor for name, tensor in load_file(shard).items() if "wqkv" in name}
    (name,) = fused
    edit_json(base / "config.json", num_key_value_heads=4)
    config = write_config(tmp_path / "merge.yaml", base, [base] * 2, prompts=False)
    with pytest.raises(CheckpointError) as caught:
        plan_merge(load_config(config, allow_identical_experts=True))
    assert str(caught.value) == (
        f"{shard}: tensor {name!r} has the shape [64, 32], where config.json says 96 rows for q_proj, k_proj, v_proj."
    )


def test_a_head_that_an_adapter_has_resized_is_refused_in_the_plan(tmp_path):
    base = make_release(tmp_path / "base", RELEASES["baichuan 2"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    rows = json.loads((base / "config.json").read_text())["vocab_size"] + 2
    name = "base_model.model.lm_head.weight"
    save_file({name: torch.ones(rows, 32)}, adapter / "adapter_model.safetensors")
    config = write_config(tmp_path / "merge.yaml", f"{base}+{adapter}", [base] * 2, prompts=False)
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(config, allow_identical_experts=True))
    assert list(caught.value.problems) == [
        f"base_model: tensor lm_head.weight cannot be merged exactly: {adapter}: its lm_head has the shape "
        f"[{rows}, 32], but the model's is [{rows - 2}, 32]"
    ]


def test_two_tensors_never_get_one_name(tmp_path):
    base = make_release(tmp_path / "base", RELEASES["Yi"])
    shard = base / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(("ln1.weight", "ln2.weight")))
    usual = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}[name.split(".")[3]]
    other = name.replace(name.split(".")[3], usual)
    save_file(tensors | {other: tensors[name].clone()}, shard, {"format": "pt"})
    config = write_config(tmp_path / "merge.yaml", base, [base] * 2, prompts=False)
    with pytest.raises(CheckpointError) as caught:
        plan_merge(load_config(config, allow_identical_experts=True))
    assert str(caught.value).endswith(f"and another one would both be called {other!r}.")


def test_every_renamed_type_is_in_the_table_of_the_page():
    page = (ROOT / "docs" / "families.md").read_text()
    for renamed in RENAMED.values():
        assert f"| `{renamed.model_type}` | `{renamed.plain}` |" in page


@pytest.mark.slow
def test_fused_tensors_are_split_as_they_are_read_from_the_hub(world, machine):
    release = RELEASES["baichuan 2"]
    folders = [make_release(machine.folder / name, release, seed) for seed, name in enumerate("abc")]
    write_config(machine.folder / "local.yaml", *[folders[0], folders[1:]])
    assert machine.moemerge("local.yaml", "local").code == 0
    for folder in folders:
        world.hub.add(f"acme/{folder.name}", files_of(folder))
        shutil.rmtree(folder)
    write_config(machine.folder / "merge.yaml", "acme/a", ["acme/b", "acme/c"])
    streamed = machine.moemerge("merge.yaml", "streamed", "--stream")
    assert streamed.code == 0, streamed.err
    assert not list(machine.cache.rglob("*.safetensors"))
    local, found = (stored(machine.folder / name) for name in ("local", "streamed"))
    assert local.keys() == found.keys()
    assert all(torch.equal(local[name], found[name]) for name in local)
