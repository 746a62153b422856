"""What can be merged, what is refused with which reason, and what the output says of itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moemerge import load_config, merge, plan_merge
from moemerge.errors import ConfigError, IncompatibleError, MoemergeError
from moemerge.sources.quantised.table import METHODS
from tests.support.models import SIZES, VOCAB, edit_json, make_model, write_config


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    """A base and two experts that a test may change."""
    return [make_model(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two"))]


def plan(tmp_path: Path, folders: list[Path], **keys):
    base, *experts = folders
    keys = {"experts_per_token": 1, **keys}
    return plan_merge(load_config(write_config(tmp_path / "merge.yaml", base, experts, prompts=False, **keys)))


def problems(tmp_path: Path, folders: list[Path], **keys) -> list[str]:
    with pytest.raises(IncompatibleError) as caught:
        plan(tmp_path, folders, **keys)
    return [problem.replace(str(tmp_path), "") for problem in caught.value.problems]


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_every_difference_between_configs_is_listed(tmp_path, pair):
    shutil.rmtree(pair[1])
    make_model(pair[1], 1, num_hidden_layers=5, hidden_size=64, intermediate_size=80, hidden_act="gelu")
    edit_json(
        pair[2] / "config.json", quantization_config={"quant_method": "bitnet"}, mlp_bias=True, attention_bias=True
    )
    assert problems(tmp_path, pair) == [
        "experts[0] /one: num_hidden_layers is 5, but the base model's is 3",
        "experts[0] /one: hidden_size is 64, but the base model's is 32",
        "experts[0] /one: hidden_act is 'gelu', but the base model's is 'silu'",
        f"experts[1] /two: is quantised (bitnet), and of the methods of quantisation {', '.join(METHODS)} alone are read. "
        "Use the original weights, or dequantise it",
        "experts[1] /two: its FFNs have biases, the base model's have none",
    ]


@pytest.mark.parametrize("layers", [2, 4])
def test_shallower_and_deeper_experts_are_refused(tmp_path, pair, layers):
    shutil.rmtree(pair[2])
    make_model(pair[2], 2, num_hidden_layers=layers)
    assert problems(tmp_path, pair) == [f"experts[1] /two: num_hidden_layers is {layers}, but the base model's is 3"]


UNREAD = "which moemerge does not read (`moemerge families` lists what it does)"


@pytest.mark.parametrize(
    ("model_type", "keys", "nearest"),
    [
        ("mistral9", {"attention_bias": None, "mlp_bias": None, "pretraining_tp": None}, "mistral, which reads all keys of its config.json: if it computes like one, merge a copy with that model_type"),
        ("llama_clip", {"clip_qkv": 8.0}, "llama, which does not read clip_qkv"),
        ("another", {"a": 1, "b": 2, "c": 3, "d": 4}, "llama, which does not read a, b, c and 1 more"),
        ("gptx", {"hidden_size": None, "num_hidden_layers": None, "n_embd": 32}, "llama, which needs hidden_size, num_hidden_layers and does not read n_embd"),
    ],
)  # fmt: skip
def test_a_type_that_is_not_read_is_named_once_with_the_nearest(tmp_path, pair, model_type, keys, nearest):
    for folder in pair:
        edit_json(folder / "config.json", model_type=model_type, **keys)
    assert problems(tmp_path, pair) == [
        f"base_model: its model_type is {model_type!r}, {UNREAD}; the nearest is {nearest}. The same holds for experts[0] "
        "/one, experts[1] /two"
    ]


def test_models_that_share_a_problem_are_named_up_to_a_few(tmp_path):
    experts = [make_model(tmp_path / str(number), number) for number in range(8)]
    for expert in experts:
        edit_json(expert / "config.json", hidden_act="gelu")
    assert problems(tmp_path, [make_model(tmp_path / "base"), *experts]) == [
        "experts[0] /0: hidden_act is 'gelu', but the base model's is 'silu'. The same holds for experts[1] /1, experts[2] "
        "/2, experts[3] /3, experts[4] /4 and 3 more"
    ]


def test_a_mixture_is_called_one(tmp_path, pair):
    merge(plan(tmp_path, pair), tmp_path / "mix")
    assert problems(tmp_path, [pair[0], pair[1], tmp_path / "mix"]) == [
        "experts[1] /mix: it is a mixture already (model_type 'mixtral'): see `moemerge edit`, or name one of its experts: "
        "/mix#one, /mix#two"
    ]
    assert problems(tmp_path, [tmp_path / "mix", *pair[1:]]) == [
        "base_model: it is a mixture already (model_type 'mixtral'): see `moemerge edit`, or name one of its experts, as in "
        "MODEL#0 or MODEL#NAME"
    ]


def test_a_model_type_that_no_family_repeats_is_refused_with_the_reason(tmp_path, pair):
    edit_json(pair[1] / "config.json", model_type="olmo3")
    assert problems(tmp_path, pair) == [
        "experts[0] /one: its model_type is 'olmo3', which no output family repeats exactly: "
        "flex_olmo has no sliding windows: equal only up to the window's length"
    ]


def test_what_a_family_cannot_express_is_refused_with_the_reason(tmp_path, pair):
    for folder in pair:
        shutil.rmtree(folder)
        make_model(folder, 1, attention_bias=True)
    assert problems(tmp_path, pair, architecture="mixtral") == [
        "mixtral: it has no biases of queries, keys and values; it has no biases of the attention's output",
    ]
    assert problems(tmp_path, pair, architecture="qwen3") == [
        "qwen3_moe: it always normalises queries and keys, llama does not",
    ]
    assert plan(tmp_path, pair).family.model_type == "granitemoehybrid"


def test_biases_of_ffns_are_refused(tmp_path, pair):
    for folder in pair:
        shutil.rmtree(folder)
        make_model(folder, 1, mlp_bias=True)
    assert problems(tmp_path, pair) == ["base_model: its FFNs have biases, which the experts of no output family have"]


def test_shared_experts_are_refused_with_the_reason(tmp_path, pair):
    found = problems(tmp_path, pair, shared_experts=[{"source_model": str(pair[1])}], architecture="granitemoe")
    assert found[0] == "granitemoe: it has no shared experts: remove shared_experts"


def test_families_are_chosen_in_the_documented_order(tmp_path, pair):
    shared = {"shared_experts": [{"source_model": str(pair[1])}]}
    assert plan(tmp_path, pair).family.model_type == "mixtral"
    assert plan(tmp_path, pair, **shared).family.model_type == "granitemoehybrid"
    assert plan(tmp_path, pair, moe_layers="second-half").family.model_type == "glm4_moe"
    assert plan(tmp_path, pair, moe_layers=[1]).family.model_type == "qwen2_moe"
    assert plan(tmp_path, pair, moe_layers=[1], **shared).family.model_type == "qwen2_moe"


def test_every_candidate_is_named_with_its_reason(tmp_path, pair):
    for folder in pair:
        shutil.rmtree(folder)
        make_model(
            folder,
            1,
            "ministral",
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"] * 2,
            num_hidden_layers=4,
            head_dim=8,
        )
    found = problems(tmp_path, pair, moe_layers="1-", shared_experts=[{"source_model": str(pair[1])}], architecture="m")
    assert found == [
        "mixtral: it has no layers that attend differently; all its layers hold experts, but moe_layers leaves layer 0 dense",
        "mellum: it always normalises queries and keys, ministral does not; it has no shared experts: remove shared_experts",
        "mimo_v2_flash: it has no sliding window; it has no layers that attend differently; "
        "it has no shared experts: remove shared_experts",
    ]
    assert problems(tmp_path, pair, architecture="lfm2") == ["lfm2_moe: does not compute like ministral"]


@pytest.mark.parametrize(("prompts", "routed", "shared"), [([], 0.5, 1.0), (["Hello there"], 1.0, 0.5)])
def test_experts_stay_whole_beside_a_shared_one_whose_gate_is_made_from_prompts(
    tmp_path, pair, prompts, routed, shared
):
    """Without prompts the gate is 0: its sigmoid of one half is made up for."""
    asked = [{"source_model": str(pair[1]), "positive_prompts": prompts}]
    base, *experts = pair
    path = write_config(tmp_path / "merge.yaml", base, experts, architecture="qwen2_moe", shared_experts=asked)
    outputs = plan_merge(load_config(path)).outputs
    (piece,) = outputs["model.layers.0.mlp.experts.1.down_proj.weight"].pieces
    assert piece.scale == routed
    (piece,) = outputs["model.layers.0.mlp.shared_expert.down_proj.weight"].pieces
    assert piece.scale == shared


def test_layers_that_cannot_be_are_refused(tmp_path, pair):
    assert problems(tmp_path, pair, moe_layers="2-7") == [
        "moe_layers: '2-7' names layers that the model does not have: it has 0 to 2"
    ]
    assert problems(tmp_path, pair, moe_layers="2-1") == ["moe_layers: '2-1' ends before it begins"]
    path = write_config(tmp_path / "merge.yaml", pair[0], pair[1:], prompts=False)
    path.write_text(path.read_text().replace("- source_model", "- layers: 1-\n  source_model", 1))
    with pytest.raises(IncompatibleError) as caught:
        plan_merge(load_config(path))
    assert list(caught.value.problems) == [
        "experts[].layers: each token is to go to 2 experts, but layer 0 is left with 1: "
        "lower experts_per_token, or let more experts take part there"
    ]


@pytest.mark.parametrize("name", ["mixtral", "Mixtral", "mix"])
def test_an_architecture_is_found_by_the_names_that_mergekit_takes(tmp_path, pair, name):
    assert plan(tmp_path, pair, architecture=name).family.model_type == "mixtral"


def test_an_unknown_architecture_lists_the_known_ones(tmp_path, pair):
    with pytest.raises(IncompatibleError) as caught:
        plan(tmp_path, pair, architecture="gpt")
    assert str(caught.value).startswith("architecture: 'gpt' is not an output family; known: mixtral, qwen3_moe, ")


def test_deepseek_is_explained_and_the_nearest_family_taken(tmp_path, pair):
    found = plan(tmp_path, pair, architecture="deepseek")
    assert found.family.model_type == "mixtral"
    assert found.notes == (
        "architecture: deepseek is DeepSeek-V1, which transformers reads only with code from a repository; "
        "mixtral is the nearest family",
    )


def test_keys_that_a_class_does_not_read_change_nothing(tmp_path, pair):
    edit_json(
        pair[0] / "config.json",
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        embedding_multiplier=2.0,
    )
    found = plan(tmp_path, pair)
    assert found.family.model_type == "mixtral"
    assert found.output_config["sliding_window"] is None
    assert found.notes == (
        "base_model: mixtral does not use these keys of its config.json: "
        "embedding_multiplier, layer_types, sliding_window",
    )


@pytest.mark.parametrize("quantised", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_without_a_config_are_noticed(tmp_path, pair, quantised):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(pair[1], lambda tensors: tensors.update({name: tensors[name].to(quantised)}))
    stored = "I8" if quantised == torch.int8 else "F8_E4M3"
    assert problems(tmp_path, pair) == [
        f"experts[0] /one: tensor {name} ({stored}) is not stored as float32, float16 or bfloat16"
    ]


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path, pair):
    def spoil(tensors):
        del tensors["model.layers.0.mlp.gate_proj.weight"], tensors["model.layers.2.mlp.gate_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(48)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)

    change_tensors(pair[2], spoil)
    change_tensors(pair[0], lambda tensors: tensors.pop("lm_head.weight"))
    assert problems(tmp_path, pair) == [
        "base_model: tensor lm_head.weight is missing",
        "experts[1] /two: tensor model.layers.0.mlp.gate_proj.weight is missing (and 1 more)",
        "experts[1] /two: tensor model.layers.0.mlp.up_proj.bias has no place in a merge",
        "experts[1] /two: tensor model.layers.1.mlp.up_proj.weight (expected [48, 32], found [40, 32]) "
        "has another shape than config.json says",
    ]


def test_derived_buffers_of_old_checkpoints_are_left_out(tmp_path, pair):
    change_tensors(
        pair[0], lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in plan(tmp_path, pair).outputs


def test_a_router_that_chooses_nothing_is_a_note(tmp_path, pair):
    assert plan(tmp_path, pair, experts_per_token=2).notes == (
        "every token passes through all 2 experts, and the router only weighs them: nothing is saved. A lower "
        "experts_per_token, or more experts, has it choose",
    )
    assert plan(tmp_path, pair, experts_per_token=1).notes == ()


def test_another_vocabulary_of_an_expert_is_a_note(tmp_path, pair):
    shutil.rmtree(pair[1])
    make_model(pair[1], 1, vocab_size=200)
    assert plan(tmp_path, pair).notes == (f"experts[0] {pair[1]}: vocabulary of 200, the base's of 160 is kept",)


def test_llama_and_mistral_experts_mix(tmp_path, pair):
    shutil.rmtree(pair[1])
    make_model(pair[1], 1, "mistral")
    assert plan(tmp_path, pair).family.model_type == "mixtral"


def test_float16_warns_of_overflow_only_where_something_is_converted(tmp_path, pair):
    assert plan(tmp_path, pair, dtype="fp16").notes == (
        "float16 cannot express weights above 65504: the merge stops if it meets one; bfloat16 holds them all",
    )
    assert plan(tmp_path, pair, dtype="bf16").notes == ()


@pytest.mark.parametrize(
    ("dtype", "noise", "told"),
    [("float32", 1e-30, True), ("bfloat16", 1e-6, True), ("bfloat16", 1e-3, False), ("float16", 1e-7, True)],
)
def test_noise_that_no_weight_feels_is_a_note(tmp_path, pair, dtype, noise, told):
    config = load_config(write_config(tmp_path / "c.yaml", pair[0], pair[1:], prompts=False, dtype=dtype))
    noisy = config.experts[0].model_copy(update={"noise_scale": noise})
    notes = plan_merge(config.model_copy(update={"experts": [noisy, config.experts[1]]})).notes
    assert (
        any(
            note.startswith(f"noise_scale {noise:g} is below the steps between most weights in {dtype}")
            for note in notes
        )
        == told
    )


def test_a_small_scale_in_float16_is_a_note(tmp_path, pair):
    config = load_config(write_config(tmp_path / "c.yaml", pair[0], pair[1:], prompts=False, dtype="float16"))
    small = config.experts[0].model_copy(update={"residual_scale": -0.001})
    notes = plan_merge(config.model_copy(update={"experts": [small, config.experts[1]]})).notes
    assert notes[-1] == (
        "float16 has few numbers below 6e-05 and none below 6e-08, so that weights times residual_scale 0.001 lose digits "
        "or become 0; bfloat16 keeps them"
    )


def test_tokenizers_that_readers_may_take_differently_are_noted(tmp_path, pair):
    (pair[0] / "tokenizer.json").unlink()
    assert plan(tmp_path, pair).notes == ("base_model: has no tokenizer.json and no tokenizer.model to copy",)
    (pair[0] / "tokenizer.model").write_bytes(b"")
    (note,) = plan(tmp_path, pair).notes
    assert note == (
        "base_model: has no tokenizer.json; one is made of tokenizer.model as transformers converts it, if it can, and "
        "compared with the base's tokenizer before anything is written"
    )


def test_unused_keys_of_the_base_are_named(tmp_path, pair):
    edit_json(pair[0] / "config.json", final_logit_softcapping=30.0)
    assert plan(tmp_path, pair).notes == (
        "base_model: mixtral does not use these keys of its config.json: final_logit_softcapping",
    )


def test_the_output_config_is_explicit_and_speaks_both_dialects(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0}
    folders = [
        make_model(
            tmp_path / str(seed),
            seed,
            "mistral",
            sliding_window=16,
            head_dim=12,
            rope_theta=5e5,
            rope_scaling=dict(rope),
        )
        for seed in range(3)
    ]
    config = plan(tmp_path, folders, experts_per_token=2).output_config
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == rope
    assert config["rope_parameters"] == rope | {"rope_theta": 5e5}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert (config["sliding_window"], config["head_dim"]) == (16, 12)
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    assert config["architectures"] == ["MixtralForCausalLM"]


@pytest.mark.parametrize("spelling", ["v4", "v4, type", "v5", "v5, top-level"])
def test_every_spelling_of_rope_is_read_alike(tmp_path, pair, spelling):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    keys = {
        "v4": {"rope_theta": 7e4, "rope_scaling": yarn | {"rope_type": "yarn"}},
        "v4, type": {"rope_theta": 7e4, "rope_scaling": yarn | {"type": "yarn"}},
        "v5": {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 7e4}},
        "v5, top-level": {"rope_parameters": yarn | {"rope_type": "yarn"}, "rope_theta": 7e4},
    }[spelling]
    edit_json(pair[0] / "config.json", **{"rope_theta": None, "rope_scaling": None, "rope_parameters": None} | keys)
    config = plan(tmp_path, pair).output_config
    assert config["rope_theta"] == 7e4
    assert config["rope_scaling"] == yarn | {"rope_type": "yarn"}


@pytest.mark.parametrize("rope", [{"rope_type": "mrope"}, {"full_attention": {"rope_type": "default"}}])
def test_rope_that_cannot_be_carried_is_refused(tmp_path, pair, rope):
    edit_json(pair[0] / "config.json", rope_parameters=rope, rope_theta=None, rope_scaling=None)
    (found,) = problems(tmp_path, pair)
    assert found.startswith("base_model: its rope")


def test_what_a_config_leaves_out_is_what_its_class_means(tmp_path, pair):
    for folder in pair:
        config = json.loads((folder / "config.json").read_text())
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        edited = {key: config[key] for key in kept} | {"model_type": "mistral", "num_key_value_heads": 2}
        (folder / "config.json").write_text(json.dumps(edited))
    config = plan(tmp_path, pair).output_config
    assert (config["sliding_window"], config["rms_norm_eps"], config["rope_theta"]) == (4096, 1e-6, 10000.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"head_dim": {"a": 1}}, "its config.json has values that make no sense: head_dim {'a': 1}"),
        ({"rms_norm_eps": "1e-5", "head_dim": -8}, "that make no sense: rms_norm_eps '1e-5', head_dim -8"),
        ({"max_position_embeddings": 0}, "that make no sense: max_position_embeddings 0"),
        ({"rope_theta": "x"}, "that make no sense: rope_theta 'x'"),
        ({"rope_parameters": {"rope_theta": "x"}, "rope_theta": None}, "its rope_theta is 'x', no positive number"),
        ({"hidden_size": 2, "head_dim": None}, "that make no sense: head_dim 0"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "has a per_layer_config, which was not proved"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 0]},
            "its no_rope_layers speaks of 2 layers, but num_hidden_layers is 3",
        ),
        ({"model_type": "qwen3", "layer_types": [{}]}, "that make no sense: layer_types [{}]"),
        ({"model_type": "lfm2", "block_multiple_of": 0}, "that make no sense: block_multiple_of 0"),
        (
            {"model_type": "paligemma", "text_config": {"model_type": "gemma"}},
            "it is multimodal (model_type 'paligemma'), with a text model of type 'gemma'; text models are read inside "
            "qwen3_5, qwen3_5_moe, gemma4, mistral3, ",
        ),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "cohere2"}},
            "it is multimodal (model_type 'mistral3'), with a text model of type 'cohere2'; of such models, those with "
            "mistral or ministral3 are read",
        ),
        (
            {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "all"},
            "use_bidirectional_attention is 'all': only causal attention was proved",
        ),
        (
            {"model_type": "gemma4", "text_config": {**SIZES, "model_type": "gemma4_text", "num_kv_shared_layers": 2}},
            "num_kv_shared_layers is 2, which leaves no layer of full_attention with keys of its own",
        ),
        (
            {"model_type": "gemma4_text", "vocab_size_per_layer_input": 100},
            f"vocab_size_per_layer_input is 100, and so less than vocab_size, {VOCAB}",
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"0": {"head_dim": 64}}},
            "its per_layer_config says more than one head_dim of layers with full attention",
        ),
        ({"model_type": ["x"]}, "its model_type is ['x']"),
        ({"num_hidden_layers": 10**9}, "its config.json needs a positive whole number for num_hidden_layers"),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path, pair, keys, message):
    edit_json(pair[0] / "config.json", **keys)
    assert message in problems(tmp_path, pair)[0]


def test_more_experts_per_token_than_experts_are_refused_however_the_config_was_made(tmp_path, pair):
    config = plan(tmp_path, pair).config.model_copy(update={"experts_per_token": 3})
    with pytest.raises(ConfigError, match="each token is to go to 3 experts, but there are only 2"):
        plan_merge(config)
    assert "experts_per_token: 3" in config.text


def test_references_that_lead_nowhere(tmp_path, pair):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for reference, message in {
        f"{tmp_path}/xyz": "there is no such folder, and it cannot be a Hub repository (user/name).",
        f"{pair[1]}+{tmp_path}/xyz": "there is no such folder, and it cannot be a Hub repository (user/name).",
        f"{pair[1]}@main": f"a folder has no revisions. Write '{pair[1]}', or a Hub repository.",
        f"{pair[1]}/config.json": f"is one file of a model. Name its folder, {pair[1]}.",
        f"{tmp_path}/adapter": f"is a LoRA adapter, not a model. Write it after its base model: model+{tmp_path}/adapter.",
        f"{tmp_path}": f"has no config.json, so it is not a model that moemerge can read. Did you mean {tmp_path}/two?",
    }.items():
        path = write_config(tmp_path / "merge.yaml", pair[0], [pair[1], Path("two")], gate_mode="random")
        path.write_text(path.read_text().replace("source_model: two", f"source_model: '{reference}'"))
        with pytest.raises(ConfigError) as caught:
            plan_merge(load_config(path))
        named = reference.rpartition("+")[2]  # of model+adapter, the adapter
        assert caught.value.problems == (f"line 11: experts[1].source_model: {named}: {message}",)


def test_parameters_are_counted(tmp_path, pair):
    planned = plan(tmp_path, pair, experts_per_token=1)
    stored = load_file(pair[0] / "model.safetensors")
    ffn = sum(tensor.numel() for name, tensor in stored.items() if ".mlp." in name)
    rest = sum(tensor.numel() for name, tensor in stored.items() if ".mlp." not in name) + 3 * 2 * 32
    assert (planned.total_parameters, planned.active_parameters) == (rest + 2 * ffn, rest + ffn)


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random"])
def test_the_estimates_of_the_plan_cover_what_a_merge_takes(tmp_path, pair, mode):
    path = write_config(tmp_path / "merge.yaml", *[pair[0], pair[1:]], gate_mode=mode)
    planned = plan_merge(load_config(path))
    # Not ru_maxrss: a process starts with that of the one that forked it.
    code = (
        "from moemerge import *; "
        f"merge(plan_merge(load_config({str(path)!r})), {str(tmp_path / 'out')!r}); "
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    peak = 1024 * int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0.6 * peak < planned.peak_memory_bytes < 2 * peak
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert planned.output_bytes <= written <= planned.output_bytes + 20_000


def test_everything_raised_on_purpose_has_one_root(tmp_path, pair):
    edit_json(pair[0] / "config.json", hidden_size=None)
    with pytest.raises(MoemergeError, match="its config.json needs a positive whole number for hidden_size"):
        plan(tmp_path, pair)
