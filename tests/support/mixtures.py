"""Tiny real mixtures of every type that is read: transformers' own classes, made from a config and not by a merge."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tests.support.families import GEMMA4, GEMMA4_E, MIXED, MLA, MUP
from tests.support.models import SIZES, edit_json, tokenizer

Layout = Literal["released", "in_memory"]
"""The names and shapes of released checkpoints, or those that transformers 5 has in memory, with stacks of experts."""

EXPERTS = 4
_NUMBERS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_COUNTED = {**_NUMBERS, "num_experts": EXPERTS}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {**_NUMBERS, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "first_k_dense_replace": 1}
_ONE_GROUP = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}
_GROUPS = {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 2.5}
_KINDS = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_LINEAR = {
    "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_SHARED = {"shared_intermediate_size": 40}
_HYBRID = {
    "position_embedding_type": "rope", "mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_head": 16, "mamba_d_state": 16,
    "layer_types": ["mamba", "attention", "attention"], **_SHARED,
}  # fmt: skip
_WINDOWS = {"sliding_window": 8, "layer_types": MIXED}
_HUNYUAN = {"num_experts": EXPERTS, "moe_topk": 2, "head_dim": 8}
_ERNIE = {
    "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_layer_end_index": 2, "head_dim": 8,
}  # fmt: skip
_COHERE = {
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "num_shared_experts": 1, "head_dim": 8, "logit_scale": 0.25,
    "prefix_dense_intermediate_size": 40, "sliding_window": 8, "layer_types": MIXED[::-1], **_KINDS,
}  # fmt: skip

# A name, the model type and what its config says. The first of a type is the plainest; others hold what it can
# do besides, among it all settings of the router.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**_LOCAL, "sliding_window": None}),
    "mixtral, tied, window, head_dim 12": (
        "mixtral", {**_LOCAL, "sliding_window": 8, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("qwen2_moe", {**_COUNTED, "shared_expert_intermediate_size": 40, "norm_topk_prob": True}),
    "qwen2_moe, as released": (
        "qwen2_moe",
        {
            **_COUNTED, "shared_expert_intermediate_size": 40, "norm_topk_prob": False, "decoder_sparse_step": 2,
            "mlp_only_layers": [], "qkv_bias": False,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**_COUNTED, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe, as released": (
        "qwen3_moe", {**_COUNTED, "head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "granitemoe": ("granitemoe", {**_LOCAL, **MUP}),
    "granitemoe, tied, biases": ("granitemoe", {**_LOCAL, **MUP, "attention_bias": True, "tie_word_embeddings": True}),
    "granitemoeshared": ("granitemoeshared", {**_LOCAL, **MUP, **_SHARED}),
    "granitemoeshared, none": ("granitemoeshared", {**_LOCAL, **MUP, "shared_intermediate_size": 0}),
    "granitemoehybrid": ("granitemoehybrid", {**_LOCAL, **MUP, **_HYBRID}),
    "granitemoehybrid, no positions": ("granitemoehybrid", {**_LOCAL, **MUP, **_HYBRID, "position_embedding_type": None}),
    "granitemoe_swa": ("granitemoe_swa", {**_LOCAL, **MUP, **_SHARED, **_WINDOWS}),
    "glm4_moe": ("glm4_moe", {**_ROUTED, **_ONE_GROUP, "head_dim": 16, "use_qk_norm": True}),
    "glm4_moe, groups": ("glm4_moe", {**_ROUTED, **_GROUPS, "head_dim": 16, "attention_bias": True}),
    "dots1": ("dots1", {**_ROUTED, **_ONE_GROUP, "head_dim": 16}),
    "dots1, groups": ("dots1", {**_ROUTED, **_GROUPS, "head_dim": 16, **_WINDOWS}),
    "flex_olmo": ("flex_olmo", {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "flex_olmo, unnormalised": (
        "flex_olmo", {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": False, "attention_bias": True},
    ),
    "olmoe": ("olmoe", {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "olmoe, as released": (
        "olmoe", {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": False, "clip_qkv": 0.5},
    ),
    "ernie4_5_moe": ("ernie4_5_moe", _ERNIE),
    "ernie4_5_moe, biases, every second layer": (
        "ernie4_5_moe",
        {**_ERNIE, "use_bias": True, "moe_layer_start_index": 0, "moe_layer_interval": 2, "moe_norm_min": 0.9},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _HUNYUAN),
    "hunyuan_v1_moe, lists by layer": ("hunyuan_v1_moe", {**_HUNYUAN, "moe_topk": [2, 1, 2], "attention_bias": True}),
    "lfm2_moe": (
        "lfm2_moe",
        {**_COUNTED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "norm_topk_prob": True},
    ),
    "lfm2_moe, unnormalised": (
        "lfm2_moe",
        {
            **_COUNTED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
            "norm_topk_prob": False, "routed_scaling_factor": 2.5, "conv_bias": True,
        },
    ),
    "lfm2_moe, without selection bias": (
        "lfm2_moe",
        {
            **_COUNTED, "num_dense_layers": 0, "layer_types": ["conv", "full_attention", "conv"],
            "use_expert_bias": False,
        },
    ),
    "cohere2_moe": ("cohere2_moe", {**_COHERE, "shared_expert_combination_strategy": "sum"}),
    "cohere2_moe, average, sigmoids": (
        "cohere2_moe", {**_COHERE, "expert_selection_fn": "sigmoid", "norm_topk_prob": False, "rms_norm_eps": 1e-5},
    ),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_COUNTED, **_LINEAR, "shared_expert_intermediate_size": 40}),
    "gemma4_text": (
        "gemma4_text",
        {**GEMMA4, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "gemma4_text, as E2B": (
        "gemma4_text",
        {
            **GEMMA4_E, "use_double_wide_mlp": True, "enable_moe_block": True, "num_experts": EXPERTS,
            "top_k_experts": 2, "moe_intermediate_size": 24,
        },
    ),
    "deepseek_v2": (
        "deepseek_v2", {**_ROUTED, **MLA, "topk_method": "greedy", "norm_topk_prob": False},
    ),
    "deepseek_v2, groups": (
        "deepseek_v2",
        {
            **_ROUTED, **MLA, **_GROUPS, "q_lora_rank": None, "topk_method": "group_limited_greedy",
            "attention_bias": True,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**_ROUTED, **MLA, **_ONE_GROUP, "routed_scaling_factor": 1.0}),
    "deepseek_v3, groups": ("deepseek_v3", {**_ROUTED, **MLA, **_GROUPS, "q_lora_rank": None}),
    "mellum": ("mellum", {**_COUNTED, **_KINDS, **_WINDOWS, "head_dim": 16, "norm_topk_prob": True}),
    "mellum, unnormalised": ("mellum", {**_COUNTED, **_WINDOWS, "head_dim": 16, "norm_topk_prob": False}),
    "exaone_moe": (
        "exaone_moe",
        {**_COUNTED, **_KINDS, **_WINDOWS, **_ONE_GROUP, "num_shared_experts": 2, "routed_scaling_factor": 1.0},
    ),
    "exaone_moe, groups": ("exaone_moe", {**_COUNTED, **_KINDS, **_WINDOWS, **_GROUPS, "num_shared_experts": 2}),
    "hy_v3": (
        "hy_v3", {**_COUNTED, **_KINDS, "num_shared_experts": 2, "head_dim": 16, "router_scaling_factor": 1.0},
    ),
    "hy_v3, scaled": ("hy_v3", {**_COUNTED, "num_shared_experts": 1, "head_dim": 16, "router_scaling_factor": 2.5}),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            **_NUMBERS, **_KINDS, **_ONE_GROUP, **_WINDOWS, "n_routed_experts": EXPERTS, "head_dim": 12, "v_head_dim": 8,
        },
    ),
    "mimo_v2_flash, groups": (
        "mimo_v2_flash",
        {**_NUMBERS, **_GROUPS, **_WINDOWS, "n_routed_experts": EXPERTS, "head_dim": 12, "v_head_dim": 8},
    ),
    "solar_open": (
        "solar_open",
        {**_NUMBERS, **_ONE_GROUP, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "head_dim": 16},
    ),
    "solar_open, groups": (
        "solar_open", {**_NUMBERS, **_GROUPS, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "head_dim": 16},
    ),
}  # fmt: skip
PLAINEST = {model_type: name for name, (model_type, _) in reversed(VARIANTS.items())}
"""The plainest variant of each model type."""


def make_variant(folder: Path, name: str, *, seed: int = 0, layout: Layout = "released", **config: Any) -> Path:
    """Save the mixture of a variant, with other settings on top."""
    model_type, settings = VARIANTS[name]
    return _made(folder, model_type, seed, layout, {**settings, **config})


def make_mixture(folder: Path, model_type: str, *, seed: int = 0, layout: Layout = "released", **config: Any) -> Path:
    """Save a random mixture of the plainest variant of a type, with its tokenizer: 3 layers, 4 experts, 2 per token.

    Equal arguments give equal bytes. Settings in `config` come on top of the variant's.
    """
    return make_variant(folder, PLAINEST[model_type], seed=seed, layout=layout, **config)


_MADE: dict[str, Path] = {}
"""What this process has made, by the arguments."""


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="moemerge-mixtures-")


def _made(folder: Path, model_type: str, seed: int, layout: Layout, settings: dict[str, Any]) -> Path:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    key = repr((model_type, seed, layout, settings))
    if key not in _MADE:
        made = Path(_home().name) / str(len(_MADE))
        _make(made, seed, layout, AutoConfig.for_model(model_type, **{**SIZES, **settings}))
        _MADE[key] = made
    # Copies are as new as if they were made now.
    shutil.copytree(_MADE[key], folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return folder


def random_mixture(config: Any, seed: int = 0) -> Any:
    """A model with weights large enough that every part matters; selection biases are among them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if values.is_floating_point():
                noise = torch.randn(values.shape, generator=generator)
                if "norm" in name:
                    values.copy_(1 + 0.2 * noise)
                else:
                    values.copy_(noise * (0.5 if "embed" in name else 0.2))
    return model.eval()


def _make(folder: Path, seed: int, layout: Layout, config: Any) -> None:
    model = random_mixture(config, seed)
    model.save_pretrained(folder)
    # Its released checkpoints hold stacks, which transformers takes apart when it saves them again.
    if layout == "in_memory" or config.model_type == "qwen3_5_moe_text":
        tensors = {name: values.clone() for name, values in model.state_dict().items()}
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer().save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
