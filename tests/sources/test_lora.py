"""LoRA adapters as experts: each tensor is what PEFT's own merge makes of it."""

import io
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint import derived
from moemerge.checkpoint.derived import read_values
from moemerge.checkpoint.unreadable import reasons
from moemerge.checks.inspection import inspect_checkpoint
from moemerge.cli.render import print_plan
from moemerge.errors import IncompatibleError, SourceError
from moemerge.evaluation.runnable import open_dense
from moemerge.sources.lora import WEIGHTS, Adapter
from moemerge.sources.model_folder import open_model
from moemerge.sources.tensor_tables import read_tensor_table
from tests.support.hub_world import files_of, lines, planned, weights_sent
from tests.support.machine import SINGLE
from tests.support.models import edit_json, load_weights, make_model, write_config

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "o_proj"]
KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"up_proj": 3}},
    "DoRA": {"use_dora": True},
    "attention too": {"target_modules": FFN + ATTENTION},
    "head saved": {"modules_to_save": ["lm_head"]},
    "head and embeddings saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head too": {"target_modules": [*FFN, "lm_head"]},
    "FFNs and norms saved": {"modules_to_save": ["mlp", "norm"], "target_modules": ATTENTION},
    "fan_in_fan_out": {"fan_in_fan_out": True},  # which PEFT sets to False for such matrices
    "biases where there are none": {"bias": "all"},
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
def test_several_readers_of_one_tensor_do_not_disturb_each_other(tmp_path, llamas, monkeypatch):
    monkeypatch.setattr(derived, "CHUNK_ELEMENTS", 32)
    expected = make_adapter(tmp_path / "adapter", llamas[0], use_dora=True)
    tensors = read_tensor_table(open_model(f"{llamas[0]}+{tmp_path / 'adapter'}", print), print)
    name = "model.layers.1.mlp.up_proj.weight"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: read_values(tensors[name]), range(200)))
    for values in found:
        torch.testing.assert_close(torch.from_numpy(values), expected[name])


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
    assert [line.split("kB ")[1].strip() for line in printed if line.startswith("experts ") and "kB " in line] == [
        f"adapter {tmp_path / 'one'} on {llamas[0]}",
        f"adapter {tmp_path / 'two'} on {llamas[0]}",
        str(llamas[1]),
    ]
    merge(plan, tmp_path / "out")
    found = load_weights(tmp_path / "out")
    for number, expert in enumerate((one, two)):
        for role, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            assert torch.equal(
                found[f"model.layers.2.block_sparse_moe.experts.{number}.{role}.weight"],
                expert[f"model.layers.2.mlp.{name}_proj.weight"],
            )
    config = write_config(tmp_path / "d.yaml", llamas[0], references, prompts=False, shared_weights="average")
    merge(plan_merge(load_config(config)), tmp_path / "mixed")
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(load_weights(tmp_path / "mixed")[name], (one[name] + two[name]) / 2)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_merged_exactly_is_refused(tmp_path, llamas):
    make_adapter(tmp_path / "good", llamas[0])
    changes = {
        "loha": ({"peft_type": "LOHA"}, "is a LOHA adapter; only LORA can be merged exactly. Merge it with PEFT."),
        "pissa": (
            {"init_lora_weights": "pissa_niter_4", "use_qalora": True},
            "cannot be merged exactly: it pools its inputs and init_lora_weights pissa_niter_4 changed the base model's "
            "weights too. Merge it with PEFT.",
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
        f"{llamas[1]}: has no adapter_config.json, so it is not an adapter. Name it after the + of model+adapter."
    )
    with pytest.raises(SourceError) as caught:
        open_model(str(tmp_path / "good"), print)
    assert str(caught.value) == (
        f"{tmp_path / 'good'}: is a LoRA adapter, not a model. Write it after its base model: {llamas[0]}+{tmp_path / 'good'}."
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
    found = load_weights(machine.folder / "out")["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
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
    for name, keys in {
        "rank": {"r": 3},
        "nested": {"alpha_pattern": {"(([a-z.0-9_]+)+)+X": 4}},
        "many": {"rank_pattern": {".*.*.*.*.*.*.*X": 4}},
        "odd": {"alpha_pattern": {"(": 4}},
        "list": {"alpha_pattern": ["x"]},
    }.items():
        shutil.copytree(tmp_path / "good", tmp_path / name)
        edit_json(tmp_path / name / "adapter_config.json", **keys)
    shutil.copytree(tmp_path / "good", tmp_path / "double")
    factors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    save_file({k: v.double() for k, v in factors.items()}, tmp_path / "double" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "good", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    for name, message in {
        "empty": "empty: has no adapter_model.safetensors and no adapter_model.bin.$",
        "alpha": "adapter_config.json: lora_alpha or alpha_pattern is not a number",
        "rank": "says that model.layers.0.mlp.down_proj has rank 3, but its matrices have 4. Save the adapter again",
        "nested": "alpha_pattern has a pattern that is too intricate",
        "many": "rank_pattern has a pattern that is too intricate",
        "odd": "alpha_pattern has a pattern that is not one",
        "list": "alpha_pattern is not an object",
        "double": "is stored as F64; expected one of",
    }.items():
        with pytest.raises(SourceError, match=message):
            read_tensor_table(open_model(f"{llamas[0]}+{tmp_path / name}", print), print)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A model whose attention has biases."""
    return make_model(tmp_path_factory.mktemp("biased") / "base", 1, "qwen2")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_what_peft_makes_of_them(tmp_path, biased, bias):
    expected = make_adapter(tmp_path / "adapter", biased, bias=bias, target_modules=[*FFN, *ATTENTION])
    tensors = read_tensor_table(open_model(f"{biased}+{tmp_path / 'adapter'}", print), print)
    assert all(torch.equal(torch.from_numpy(read_values(tensors[name])), expected[name]) for name in expected)
    assert tensors["model.layers.0.self_attn.q_proj.bias"].path.name == WEIGHTS[0]


def rewritten(folder, name, change, **keys):
    """A copy of an adapter with other tensors, and other keys in its config."""
    shutil.copytree(folder, folder.parent / name)
    tensors = load_file(folder / WEIGHTS[0])
    save_file(change(tensors), folder.parent / name / WEIGHTS[0])
    edit_json(folder.parent / name / "adapter_config.json", **keys)
    return folder.parent / name


def renamed(before, after):
    return lambda tensors: {name.replace(before, after): tensor for name, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model.model.", ""),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "_orig_mod.base_model.model."),
        (".weight", ".default.weight"),
    ],
)
def test_names_that_peft_and_others_give_mean_the_same(tmp_path, llamas, before, after):
    expected = make_adapter(tmp_path / "good", llamas[0], target_modules=[*FFN, "q_proj"])
    folder = rewritten(tmp_path / "good", "other", renamed(before, after))
    tensors = read_tensor_table(open_model(f"{llamas[0]}+{folder}", print), print)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(torch.from_numpy(read_values(tensors[name])), expected[name]) for name in expected)


def resized(tensors):
    return tensors | {
        f"base_model.model.{name}": torch.ones(162, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }


def with_other_modules(tensors):
    names = ("score.weight", "vision.layers.0.up_proj.lora_A.weight", "vision.layers.0.up_proj.lora_B.weight", "x")
    return tensors | {f"base_model.model.{name}": torch.ones(4, 4) for name in names}


EMBEDDINGS, HEAD, FFN_WEIGHT = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
ALONE = "is in the adapter {} alone: the model before the + has no such tensor"
# Of each adapter what is left out, the reason, and whether it means attention or embeddings of the base model.
BESIDE = {
    "factors of embeddings": ({"target_modules": [*FFN, "embed_tokens"]}, None, {EMBEDDINGS: "cannot be merged exactly: {}: it adds factors that embeddings have"}, True),
    "lengths of embeddings": ({"target_modules": [*FFN, "embed_tokens"], "use_dora": True}, None, {EMBEDDINGS: "cannot be merged exactly: {}: it adds factors that embeddings have"}, True),
    "single tokens": ({"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}, None, {HEAD: "cannot be merged exactly: {}: it trains single tokens (and 1 more)"}, True),
    "a resized vocabulary": ({}, resized, {EMBEDDINGS: "cannot be merged exactly: {}: its model.embed_tokens has the shape [162, 32], but the model's is [160, 32]", HEAD: "cannot be merged exactly: {}: its lm_head has the shape [162, 32], but the model's is [160, 32]"}, True),
    "modules of another kind of model": ({}, with_other_modules, {"score.weight": f"{ALONE} (and 2 more)"}, False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BESIDE)
def test_what_an_adapter_does_beside_the_ffns_does_not_block_a_merge(tmp_path, llamas, kind):
    keys, change, left_out, is_shared = BESIDE[kind]
    folder = tmp_path / "adapter"
    expected = make_adapter(folder, llamas[0], **keys)
    if change:
        folder = rewritten(folder, "changed", change)
    reference = f"{llamas[0]}+{folder}"
    arguments = (tmp_path / "c.yaml", llamas[0], [reference, llamas[1]])
    plan = plan_merge(load_config(write_config(*arguments, prompts=False)))
    reasons = [f"tensor {tensor} {reason.format(folder)}" for tensor, reason in left_out.items()]
    assert sorted(note for note in plan.notes if "experts[0]" in note) == sorted(
        f"experts[0] {reference}: left out: {reason}" for reason in reasons
    )
    merge(plan, tmp_path / "out")
    found = load_weights(tmp_path / "out")["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    assert torch.equal(found, expected[FFN_WEIGHT])
    config = load_config(write_config(*arguments, prompts=False, shared_weights="average"))
    if kind == "a resized vocabulary":  # as of an expert whose own weights have another
        kept = (
            f"shared_weights: {EMBEDDINGS} is the base model's: experts[0] {reference} has another vocabulary, or none of its "
            "own"
        )
        assert kept in plan_merge(config).notes
    elif is_shared:
        with pytest.raises(IncompatibleError) as caught:
            plan_merge(config)
        (reason,) = left_out.values()
        told = f"experts[0] {reference}: {EMBEDDINGS} {reason.format(folder)}"
        assert list(caught.value.problems) == [told]
    if is_shared:
        with pytest.raises(IncompatibleError, match=f"{re.escape(reference)}: cannot be run:"):
            open_dense(reference, "expert", print)
    else:
        plan_merge(config)
        assert torch.equal(open_dense(reference, "expert", print).read(FFN_WEIGHT), expected[FFN_WEIGHT])
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(write_config(tmp_path / "c.yaml", reference, llamas[1:3], prompts=False)))
    assert sorted(caught.value.problems) == sorted(f"base_model: {reason}" for reason in reasons)
    told = [f"{tensor} {reason.format(folder)}".partition(" (and")[0] for tensor, reason in left_out.items()]
    assert set(told) <= set(inspect_checkpoint(reference).warnings)


@pytest.mark.filterwarnings("ignore")
def test_a_bias_of_an_adapter_s_own_is_left_out_or_refused(tmp_path, biased, llamas):
    make_adapter(tmp_path / "adapter", biased, lora_bias=True, target_modules=[*ATTENTION, *FFN][:1])
    folder = rewritten(tmp_path / "adapter", "ffn", renamed("self_attn.q_proj", "mlp.down_proj"))
    tensors = read_tensor_table(open_model(f"{biased}+{tmp_path / 'adapter'}", print), print)
    reason = "cannot be merged exactly: {}: it trains a bias of its own"
    expected = {f"model.layers.{layer}.self_attn.q_proj.{kind}" for layer in range(3) for kind in ("weight", "bias")}
    assert reasons(tensors) == dict.fromkeys(expected, reason.format(tmp_path / "adapter"))
    reference = f"{biased}+{folder}"
    config = write_config(tmp_path / "c.yaml", biased, [reference, biased], prompts=False)
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(config))
    assert caught.value.problems == (
        f"experts[0] {reference}: tensor model.layers.0.mlp.down_proj.weight {reason.format(folder)} (and 2 more)",
    )


@pytest.mark.filterwarnings("ignore")
def test_a_second_adapter_does_not_hide_what_the_first_did(tmp_path, llamas):
    make_adapter(tmp_path / "tokens", llamas[0], trainable_token_indices=[3])
    make_adapter(tmp_path / "saved", llamas[0], modules_to_save=["embed_tokens"])
    model = open_model(f"{llamas[0]}+{tmp_path / 'tokens'}+{tmp_path / 'saved'}", print)
    assert reasons(read_tensor_table(model, print)) == {
        EMBEDDINGS: f"cannot be merged exactly: {tmp_path / 'tokens'}: it trains single tokens"
    }


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_the_layers_is_refused_at_once(tmp_path, llamas):
    make_adapter(tmp_path / "good", llamas[0])
    up = "base_model.model.model.layers.0.mlp.up_proj"
    changes = {
        "deeper": (renamed("layers.2.", "layers.7."), "targets model.layers.7.mlp.{}, which the model before the + does not have."),
        "half": (lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{up}.lora_A.weight"}, "has no lora_A for model.layers.0.mlp.up_proj."),
        "strange": (renamed("up_proj.lora_A", "up_proj.lora_C"), "nothing is known of its tensor base_model.model.model.layers.0.mlp.up_proj.lora_C.weight. Merge it with PEFT."),
        "both": (lambda tensors: tensors | {f"{up}.weight": torch.ones(48, 32)}, "has both a weight and factors for model.layers.0.mlp.up_proj."),
        "saved": (lambda _: {f"{up}.weight": torch.ones(4, 32)}, "its model.layers.0.mlp.up_proj has the shape [4, 32], but the model's is [48, 32]."),
    }  # fmt: skip
    for name, (change, message) in changes.items():
        folder = rewritten(tmp_path / "good", name, change)
        with pytest.raises(SourceError) as caught:
            read_tensor_table(open_model(f"{llamas[0]}+{folder}", print), print)
        assert str(caught.value) in {f"{folder}: {message.format(role)}" for role in FFN}
    folder = rewritten(
        tmp_path / "good",
        "twice",
        lambda tensors: (
            tensors | {name.removeprefix("base_model.model."): tensor.clone() for name, tensor in tensors.items()}
        ),
    )
    with pytest.raises(SourceError, match=r"adapter_model.safetensors: tensor .* is there twice, under another name\."):
        read_tensor_table(open_model(f"{llamas[0]}+{folder}", print), print)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_in_a_pickle_is_the_same(tmp_path, llamas):
    expected = make_adapter(tmp_path / "adapter", llamas[0])
    factors = load_file(tmp_path / "adapter" / WEIGHTS[0])
    (tmp_path / "adapter" / WEIGHTS[0]).unlink()
    strange = {name: tensor.T.contiguous().T for name, tensor in factors.items()} | {"epoch": 3}
    torch.save(strange, tmp_path / "adapter" / WEIGHTS[1])
    model = open_model(f"{llamas[0]}+{tmp_path / 'adapter'}", print)
    tensors = read_tensor_table(model, print)
    assert reasons(tensors) == {"epoch": "is not a tensor but int"}
    assert all(torch.equal(torch.from_numpy(read_values(tensors[name])), expected[name]) for name in expected)
    before = tensors[FFN_WEIGHT].path.identity
    os.utime(tmp_path / "adapter" / WEIGHTS[1], ns=(1, 1))
    assert read_tensor_table(model, print)[FFN_WEIGHT].path.identity != before
    lost = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    torch.save(strange | {lost: factors[lost].to("meta")}, tmp_path / "adapter" / WEIGHTS[1])
    with pytest.raises(SourceError) as caught:
        read_tensor_table(model, print)
    assert str(caught.value) == f"{tmp_path / 'adapter'}: its {lost} is a meta tensor, without numbers."


@pytest.mark.filterwarnings("ignore")
def test_embeddings_in_float64_are_refused_where_they_are_needed(tmp_path, llamas):
    make_adapter(tmp_path / "good", llamas[0], modules_to_save=["embed_tokens"])
    name = f"base_model.model.{EMBEDDINGS}"
    folder = rewritten(tmp_path / "good", "wide", lambda tensors: tensors | {name: tensors[name].double()})
    reference = f"{llamas[0]}+{folder}"
    arguments = (tmp_path / "c.yaml", llamas[0], [reference, llamas[1]])
    plan_merge(load_config(write_config(*arguments, prompts=False)))
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(write_config(*arguments, prompts=False, shared_weights="average")))
    assert caught.value.problems == (
        f"experts[0] {reference}: has no tensor {EMBEDDINGS} of shape [160, 32] in float32, float16 or bfloat16, as the "
        "base model has",
    )
    with pytest.raises(IncompatibleError) as caught:
        open_dense(reference, "expert", print)
    assert str(caught.value) == (
        f"{reference}: cannot be run:\n  - {EMBEDDINGS} is stored as F64; expected one of float32, float16, bfloat16"
    )


@pytest.mark.parametrize("named", ["user/base", "user/base@main", "/no such/base/of mine", 3, None])
def test_what_an_adapter_was_trained_on_is_known_where_it_is_a_repository(tmp_path, named):
    adapter = Adapter("a", tmp_path, {"base_model_name_or_path": named})
    assert adapter.trained_on == ("user/base" if str(named).startswith("user") else None)
