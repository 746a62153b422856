"""LoRA adapters as experts: each tensor is what PEFT's own merge makes of it."""

import io
import shutil

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.derived import read_values
from moemerge.cli.render import print_plan
from moemerge.errors import IncompatibleError, SourceError
from moemerge.sources import open_model, read_tensor_table
from moemerge.sources.lora import WEIGHTS
from tests.hub_world import files_of, lines, planned, weights_sent
from tests.machine import SINGLE
from tests.models import edit_json, make_model, write_config

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "o_proj"]
KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"up_proj": 3}},
    "DoRA": {"use_dora": True},
    "attention too": {"target_modules": FFN + ATTENTION},
    "head saved": {"modules_to_save": ["lm_head"]},
}


def make_adapter(folder, base, seed=0, **keys):
    """Train nothing: random factors; gives the tensors that PEFT makes of base and adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": FFN, "task_type": "CAUSAL_LM"} | keys
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
            del name
    tuned.save_pretrained(folder)
    return tuned.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_is_what_peft_makes_of_it(tmp_path, llamas, kind):
    expected = make_adapter(tmp_path / "adapter", llamas[0], **KINDS[kind])
    model = open_model(f"{llamas[0]}+{tmp_path / 'adapter'}", print)
    tensors = read_tensor_table(model, print)
    assert tensors.keys() == expected.keys()
    changed = 0
    for name, tensor in tensors.items():
        found = torch.from_numpy(read_values(tensor))
        assert torch.equal(found, expected[name]), (name, (found - expected[name]).abs().max())
        changed += tensor.path != llamas[0] / SINGLE
    assert changed >= 9


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_an_expert(tmp_path, llamas):
    one = make_adapter(tmp_path / "one", llamas[0], 1, target_modules=FFN + ATTENTION)
    two = make_adapter(tmp_path / "two", llamas[0], 2)
    references = [f"{llamas[0]}+{tmp_path / name}" for name in ("one", "two")]
    config = write_config(tmp_path / "c.yaml", llamas[0], [*references, llamas[1]], prompts=False)
    plan = plan_merge(load_config(config))
    assert [note for note in plan.notes if "adapter" in note] == [
        f"experts[0] {references[0]}: what the adapter changes in 6 tensors beside the FFNs is not used; shared_weights: "
        "average takes it in"
    ]
    console = Console(width=1000, file=io.StringIO())
    print_plan(console, plan)
    printed = console.file.getvalue().splitlines()
    assert [line.split("kB ")[1].strip() for line in printed if line.startswith("experts ")] == [
        f"adapter {tmp_path / 'one'} on {llamas[0]}", f"adapter {tmp_path / 'two'} on {llamas[0]}", str(llamas[1])
    ]  # fmt: skip
    merge(plan, tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    for number, expert in enumerate((one, two)):
        for role, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            assert torch.equal(
                found[f"model.layers.2.block_sparse_moe.experts.{number}.{role}.weight"],
                expert[f"model.layers.2.mlp.{name}_proj.weight"],
            )
    config = write_config(tmp_path / "d.yaml", llamas[0], references, prompts=False, shared_weights="average")
    merge(plan_merge(load_config(config)), tmp_path / "mixed")
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(load_file(tmp_path / "mixed" / SINGLE)[name], (one[name] + two[name]) / 2)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_merged_exactly_is_refused(tmp_path, llamas):
    make_adapter(tmp_path / "good", llamas[0])
    changes = {
        "loha": ({"peft_type": "LOHA"}, "is a LOHA adapter; only LORA can be merged exactly. Merge it with PEFT."),
        "bias": ({"bias": "all"}, "cannot be merged exactly: it trains biases of the base model. Merge it with PEFT."),
        "pissa": (
            {"init_lora_weights": "pissa_niter_4", "fan_in_fan_out": True},
            "cannot be merged exactly: its matrices lie the other way round and init_lora_weights pissa_niter_4 changed "
            "the base model's weights too. Merge it with PEFT.",
        ),
    }
    for name, (keys, message) in changes.items():
        shutil.copytree(tmp_path / "good", tmp_path / name)
        edit_json(tmp_path / name / "adapter_config.json", **keys)
        with pytest.raises(SourceError) as caught:
            open_model(f"{llamas[0]}+{tmp_path / name}", print)
        assert str(caught.value) == f"{tmp_path / name}: {message}"
    with pytest.raises(SourceError) as caught:
        open_model(f"{llamas[0]}+{llamas[1]}", print)
    assert str(caught.value) == (
        f"{llamas[1]}: has no adapter_config.json, so it is no adapter. Name it after the + of model+adapter."
    )
    with pytest.raises(SourceError) as caught:
        open_model(str(tmp_path / "good"), print)
    assert str(caught.value) == (
        f"{tmp_path / 'good'}: is a LoRA adapter, not a model. Write it after its base model: model+adapter."
    )
    other = make_model(tmp_path / "wide", 1, intermediate_size=64)
    with pytest.raises(
        SourceError, match=r"for model.layers.0.mlp.\w+ it has matrices .* it was trained on another base"
    ):
        read_tensor_table(open_model(f"{other}+{tmp_path / 'good'}", print), print)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_ffns_is_no_expert(tmp_path, llamas):
    make_adapter(tmp_path / "adapter", llamas[0], target_modules=ATTENTION)
    reference = f"{llamas[0]}+{tmp_path / 'adapter'}"
    config = write_config(tmp_path / "c.yaml", llamas[0], [reference, llamas[1]], prompts=False)
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(config))
    assert caught.value.problems == (
        f"experts[0] {reference}: the adapter changes no FFN, so the expert would be the model before the +. Choose one "
        "that targets gate_proj, up_proj or down_proj",
    )


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_the_hub_is_added_to_a_streamed_model(world, machine, tmp_path):
    expected = make_adapter(machine.folder / "adapter", world.folder / "fox")
    edit_json(machine.folder / "adapter" / "adapter_config.json", base_model_name_or_path="acme/hound")
    adapter = files_of(machine.folder / "adapter")
    world.hub.add("acme/adapter", adapter)
    world.hub.add("acme/both", files_of(world.folder / "fox") | {WEIGHTS[0]: adapter[WEIGHTS[0]]})
    shutil.rmtree(machine.folder / "adapter")
    config = write_config(
        machine.folder / "merge.yaml", "acme/base", ["acme/both+acme/adapter", "acme/code"], prompts=False
    )
    plan = planned(machine, str(config))
    assert WEIGHTS[0] in world.hub.downloaded("acme/adapter")
    assert WEIGHTS[0] not in world.hub.downloaded("acme/both")
    world.hub.reset()
    result = machine.moemerge(str(config), "out", "--stream")
    assert result.code == 0, lines(result)
    assert (
        "experts[0] acme/both+acme/adapter: the adapter acme/adapter was trained on acme/hound, not on acme/both"
        in (plan["notes"])
    )
    assert plan["download_bytes"] < weights_sent(world.hub) < plan["remote_bytes"]
    found = load_file(machine.folder / "out" / SINGLE)["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert torch.equal(found, expected["model.layers.0.mlp.gate_proj.weight"])
    card = (machine.folder / "out" / "README.md").read_text()
    assert "- acme/adapter" in card


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_was_trained_again_is_read_again(tmp_path, llamas):
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        expected = make_adapter(tmp_path / "adapter", llamas[0], seed)
        tensors = read_tensor_table(open_model(f"{llamas[0]}+{tmp_path / 'adapter'}", print), print)
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(torch.from_numpy(read_values(tensors[name])), expected[name])


@pytest.mark.filterwarnings("ignore")
def test_damaged_adapters_are_clear_errors(tmp_path, llamas):
    make_adapter(tmp_path / "good", llamas[0])
    shutil.copytree(tmp_path / "good", tmp_path / "alpha")
    edit_json(tmp_path / "alpha" / "adapter_config.json", lora_alpha="x")
    shutil.copytree(tmp_path / "good", tmp_path / "double")
    factors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    save_file({k: v.double() for k, v in factors.items()}, tmp_path / "double" / "adapter_model.safetensors")
    for name, message in {
        "alpha": "adapter_config.json: lora_alpha or alpha_pattern is no number",
        "double": "is stored as F64; expected one of",
    }.items():
        with pytest.raises(SourceError, match=message):
            read_tensor_table(open_model(f"{llamas[0]}+{tmp_path / name}", print), print)
