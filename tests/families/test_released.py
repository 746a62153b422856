"""Mixtures that no merge wrote: every setting of transformers' classes, and configs as they were released."""

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moemerge.checkpoint.header import read_header
from moemerge.evaluation.baselines import uniform
from moemerge.evaluation.routes.tracing import trace
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.running import run_model
from moemerge.evaluation.settings import TraceSettings
from moemerge.families.choosing import Choosing, choosing
from moemerge.families.in_memory import released_layout
from moemerge.families.released import READABLE
from moemerge.families.selection import MOE_FAMILIES
from moemerge.families.stored_mixture import StoredMixture
from tests.evaluation.test_evaluation import CPU, losses_of, windows
from tests.families.test_stored_mixture import FAMILIES, modules
from tests.passes.test_passes import IS_V4, is_known
from tests.support.mixtures import EXPERTS, PLAINEST, VARIANTS, make_mixture, make_variant
from tests.support.models import load

ON_5 = pytest.mark.skipif(IS_V4, reason="transformers 4 has other classes")
# What losses of training, generation and layers that predict further tokens are told by, or nothing is.
_UNUSED = {
    "output_router_logits", "router_aux_loss_coef", "pretraining_tp", "eod_token_id", "sep_token_id", "num_mtp_layers",
    "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types",
}  # fmt: skip
# Of a class, and never read by its forward pass, which does not divide by the sum.
_NEVER_READ = {"deepseek_v2": {"norm_topk_prob"}}


def test_every_type_that_is_read_has_a_tiny_mixture_here():
    assert PLAINEST.keys() == READABLE.keys()
    assert MOE_FAMILIES.items() < READABLE.items()


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_the_whole_model(tmp_path, name):
    model_type, _ = VARIANTS[name]
    if not is_known(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    folder = make_variant(tmp_path / "made", name)
    found = run_model(open_mixture(folder).runnable, windows(), CPU)
    assert torch.allclose(found.float(), losses_of(load(folder)), rtol=1e-5)


@ON_5
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_choices_of_stacked_experts_are_those_of_the_whole_model(tmp_path, name):
    folder = make_variant(tmp_path / "made", name, layout="in_memory")
    model, mixture, seen, expected = load(folder), open_mixture(folder), [], []
    found = run_model(mixture.runnable, windows(), CPU, mixture=mixture, chosen=seen.append)
    for layer, module in modules(model).items():
        module.register_forward_pre_hook(lambda _, given, layer=layer: expected.append((layer, *given[1:])))
    assert torch.allclose(found.float(), losses_of(model), rtol=1e-5)
    assert len(seen) == len(expected) == len(mixture.moe_layers) * len(windows())
    for number, (layer, experts, weights) in enumerate(expected):
        window = number // len(mixture.moe_layers)
        choice = next(choice for choice in seen if (choice.layer, choice.window) == (layer, window))
        falling, order = weights.sort(dim=1, descending=True)
        assert torch.equal(choice.experts, experts.gather(1, order))
        assert torch.allclose(choice.weights, falling, atol=1e-5)


@ON_5
@pytest.mark.parametrize("model_type", READABLE)
def test_no_setting_of_a_class_is_dropped(model_type):
    made, own = CONFIG_MAPPING[model_type], {field.name for field in dataclasses.fields(PretrainedConfig)}
    settings = {made.attribute_map.get(field.name, field.name) for field in dataclasses.fields(made)} - own
    dropped = settings - READABLE[model_type].read_keys - _UNUSED
    assert dropped == _NEVER_READ.get(model_type, set())


@ON_5
@pytest.mark.parametrize(
    "name", ["glm4_moe, groups", "lfm2_moe, unnormalised", "deepseek_v2, groups", "olmoe, as released"]
)
def test_the_uniform_mixture_has_all_experts_of_all_groups(tmp_path, name):
    seen = []
    mixture = open_mixture(make_variant(tmp_path / "made", name))
    model = load(tmp_path / "made")
    found = run_model(uniform(mixture), windows(), CPU)

    def evened(_module, given):
        seen.append(len(given[0]))
        shape = (seen[-1], EXPERTS)
        return given[0], torch.arange(EXPERTS).expand(shape), torch.full(shape, mixture.choosing.scale / EXPERTS)

    for module in modules(model).values():
        module.register_forward_pre_hook(evened)
    assert torch.allclose(found.float(), losses_of(model), rtol=1e-5)
    assert len(seen) == len(mixture.moe_layers) * len(windows())


def test_routes_of_layers_with_fewer_experts_per_token_have_weights_of_0(tmp_path):
    folder = make_mixture(tmp_path / "made", "hunyuan_v1_moe", moe_topk=[2, 1, 2])
    (traced,) = trace(folder, {"text": "The quick brown fox"}, TraceSettings(32, device="cpu")).texts
    assert traced.experts.shape == traced.weights.shape == (3, len(traced.tokens), 2)
    assert (traced.weights[1] == [1, 0]).all()
    assert (traced.weights[[0, 2]] > 0).all()


@ON_5
def test_layers_that_predict_further_tokens_are_kept_and_not_run(tmp_path):
    """As in DeepSeek-V3: a layer after the last one, with experts of its own, whose weights have scales."""
    folder = make_mixture(tmp_path / "made", "deepseek_v3")
    before = run_model(open_mixture(folder).runnable, windows(), CPU)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    further = {name.replace(".2.", ".3.", 1): 2 * values for name, values in tensors.items() if ".layers.2." in name}
    further |= {"model.layers.3.eh_proj.weight": torch.ones(32, 64), "model.layers.3.enorm.weight": torch.ones(32)}
    scales = {f"{name}_scale_inv": torch.ones(1, 1) for name in tensors if ".experts." in name}
    save_file(tensors | further | scales, path)
    config = json.loads((folder / "config.json").read_text())
    family = READABLE["deepseek_v3"]
    mixture = StoredMixture(family, config, released_layout(family, read_header(path)), tuple("0123"))
    assert mixture.moe_layers == (1, 2, 3)
    own = {f"mlp.experts.{{expert}}.{role}_proj.weight" for role in ("gate", "up", "down")}
    assert mixture.of_expert(3, 1).keys() == own
    assert mixture.of_expert(2, 1).keys() == own | {f"{name}_scale_inv" for name in own}
    save_file(tensors | further, path)
    opened = open_mixture(folder)
    assert opened.moe_layers == [1, 2]
    assert torch.equal(run_model(opened.runnable, windows(), CPU), before)


@ON_5
@pytest.mark.parametrize(
    ("model_type", "name"), [("ernie4_5_moe", "model.mtp_block.0.mlp.weight"), ("exaone_moe", "mtp.layers.0.weight")]
)
def test_what_a_class_leaves_out_is_left_out(tmp_path, model_type, name):
    folder = make_mixture(tmp_path / "made", model_type)
    before = run_model(open_mixture(folder).runnable, windows(), CPU)
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(3, 3)}, path)
    assert torch.equal(run_model(open_mixture(folder).runnable, windows(), CPU), before)


# config.json of released mixtures, without what is about tokens, training and names.
RELEASED: dict[str, tuple[dict[str, Any], Choosing]] = {
    "mistralai/Mixtral-8x7B-v0.1": (
        {
            "model_type": "mixtral", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        Choosing("softmax"),
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        {
            "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
            "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
            "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        Choosing("softmax", normalises=False),
    ),
    "Qwen/Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
            "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        Choosing("softmax"),
    ),
    "allenai/OLMoE-1B-7B-0924": (
        {
            "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "vocab_size": 50304,
        },
        Choosing("softmax", normalises=False),
    ),
    "ibm-granite/granite-3.1-3b-a800m-base": (
        {
            "model_type": "granitemoe", "attention_bias": False, "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 512,
            "logits_scaling": 6.0, "max_position_embeddings": 131072, "num_attention_heads": 24,
            "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 40,
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000.0,
            "tie_word_embeddings": True, "vocab_size": 49155,
        },
        Choosing("softmax"),
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2", "attention_bias": False, "first_k_dense_replace": 1, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
            "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
            "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.0,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
                "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
            },
            "scoring_func": "softmax", "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy",
            "v_head_dim": 128, "vocab_size": 102400,
        },
        Choosing("softmax", normalises=False),
    ),
    "deepseek-ai/DeepSeek-V3": (
        {
            "model_type": "deepseek_v3", "attention_bias": False, "first_k_dense_replace": 3, "hidden_act": "silu",
            "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
            "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            },
            "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
            "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
        },
        Choosing("sigmoid", scale=2.5, groups=8, chosen_groups=4, best_of_group=2),
    ),
    "zai-org/GLM-4.5-Air": (
        {
            "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
            "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False, "vocab_size": 151552,
        },
        Choosing("sigmoid", best_of_group=2),
    ),
    "baidu/ERNIE-4.5-21B-A3B-PT": (
        {
            "model_type": "ernie4_5_moe", "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
            "max_position_embeddings": 131072, "moe_capacity": [64, 64, 64], "moe_gate": "topk",
            "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 27, "moe_layer_interval": 1,
            "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": True,
            "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000, "tie_word_embeddings": True,
            "use_bias": False, "vocab_size": 103424,
        },
        Choosing("softmax", least=1e-12),
    ),
    "tencent/Hunyuan-A13B-Instruct": (
        {
            "model_type": "hunyuan_v1_moe", "attention_bias": False, "attention_head_dim": 128, "cla_share_factor": 2,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 3072,
            "max_position_embeddings": 32768, "mlp_bias": False, "moe_intermediate_size": [3072] * 32,
            "moe_topk": [8] * 32, "norm_topk_prob": True, "norm_type": "rms", "num_attention_heads": 32,
            "num_experts": 64, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_shared_expert": [1] * 32,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": True, "use_cla": False,
            "rope_scaling": {
                "type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "use_mixed_mlp_moe": True, "use_qk_norm": True, "vocab_size": 128167,
        },
        Choosing("softmax"),
    ),
}  # fmt: skip


@ON_5
@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_read_as_transformers_reads_them(name):
    """What a run passes to the class leaves no setting at the class's default that the config sets."""
    config, expected = RELEASED[name]
    family = READABLE[config["model_type"]]
    settings = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.model_type])} | {"rope_parameters"}
    whole = AutoConfig.for_model(**config)
    kept = {key: value for key, value in config.items() if key in family.read_keys}
    passed = AutoConfig.for_model(family.model_type, **kept)
    ignored = _UNUSED | _NEVER_READ.get(family.model_type, set())
    assert {key: getattr(passed, key, None) for key in settings - ignored} == {
        key: getattr(whole, key, None) for key in settings - ignored
    }
    assert choosing(family, config) == expected


@ON_5
@pytest.mark.parametrize("model_type", READABLE)
def test_absent_keys_mean_what_the_class_says(model_type):
    """The defaults of the router's settings, where config.json has none."""
    family, made = READABLE[model_type], CONFIG_MAPPING[model_type]()
    said = {key: value for key, value in made.to_dict().items() if key in family.read_keys}
    assert choosing(family, {}) == choosing(family, said)
