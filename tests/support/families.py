"""Tiny models of every dense family, and mixtures of them in plain torch, independent of any MoE class."""

import copy
from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moemerge.families.dense import DENSE_FAMILIES, DenseModel
from moemerge.families.engines import Trouble, facts_of, trouble_of
from moemerge.families.mixture_shape import Mixture as Shape
from moemerge.planning.plan import MergePlan
from tests.support.models import load

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "rope_theta": 500000.0,
        },
    ),
    "llama, yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "llama, head_dim 12": ("llama", {"head_dim": 12}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, tied, head_dim 12": ("mistral", {"tie_word_embeddings": True, "head_dim": 12}),
    "mistral, window of 8": ("mistral", {"sliding_window": 8}),
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
MUP = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
# Spelled as both versions of transformers read it.
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
MINISTRAL3 = {
    "rope_parameters": YARN["rope_scaling"]
    | {
        "rope_theta": 10000.0,
        "llama_4_scaling_beta": 0.5,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
HYBRID = {
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
    "position_embedding_type": "rope",
    "mamba_n_heads": 4,
    "mamba_expand": 2,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "layer_types": ["mamba", "attention", "attention"],
}
GEMMA4 = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 256, "head_dim": 8, "global_head_dim": 16,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 0, "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA4_E = GEMMA4 | {
    "hidden_size_per_layer_input": 6, "attention_k_eq_v": False, "num_global_key_value_heads": None,
    "num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "pad_token_id": None,  # whose embedding transformers' class sets to zero, whatever is stored
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# A name, the model type and what its config says. The first of a type is the plainest.
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, llama3 rope": ("llama", {"tie_word_embeddings": True, **LLAMA3}),
    "llama, head_dim 12, yarn": ("llama", {"head_dim": 12, **YARN}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 8, "head_dim": 12}),
    "ministral": ("ministral", {"head_dim": 8, "sliding_window": 8}),
    "ministral, mixed windows": ("ministral", {"head_dim": 12, "sliding_window": 8, "layer_types": MIXED}),
    "ministral3": ("ministral3", {"sliding_window": None, "head_dim": 8, **MINISTRAL3}),
    "cwm, mixed windows": ("cwm", {"head_dim": 8, "sliding_window": 8, **LLAMA3}),
    "phi3": ("phi3", {"sliding_window": None, "resid_pdrop": 0.0}),
    "phi3, longrope": (
        "phi3",
        {
            "sliding_window": None, "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
        },
    ),
    "phi3, window as long as the context, partial rotary": ("phi3", {"sliding_window": 128, "partial_rotary_factor": 0.5}),
    "phi3, partial rotary": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, yarn": ("qwen2", {"tie_word_embeddings": True, **YARN}),
    "qwen2, mixed windows": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, tied, biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3, mixed windows, yarn": ("qwen3", {"head_dim": 16, **WINDOWS, **YARN}),
    "seed_oss": ("seed_oss", {"head_dim": 12}),
    "smollm3, layers without positions": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "granite": ("granite", MUP),
    "granite, tied, biases": ("granite", {**MUP, "attention_bias": True, "tie_word_embeddings": True}),
    "granite_swa": ("granite_swa", {**MUP, "sliding_window": 8, "layer_types": MIXED}),
    "granitemoehybrid": ("granitemoehybrid", {**MUP, **HYBRID}),
    "granitemoehybrid, no positions, biases": (
        "granitemoehybrid",
        {**MUP, **HYBRID, "position_embedding_type": None, "attention_bias": True, "time_step_limit": [0.1, 0.5]},
    ),
    "hyperclovax, plain scales": ("hyperclovax", {"use_post_norm": False}),
    "hyperclovax": ("hyperclovax", {**MUP, "use_post_norm": False}),
    "olmo2": ("olmo2", {}),
    "olmo2, biases, linear rope": ("olmo2", {"attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8}),
    "ernie4_5, tied, head_dim 12": ("ernie4_5", {"head_dim": 12, "tie_word_embeddings": True}),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 12}),
    "hunyuan_v1_dense, biases, linear rope": (
        "hunyuan_v1_dense",
        {"head_dim": 12, "attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": False}),
    "cohere2": ("cohere2", {"sliding_window": 8, "logit_scale": 0.25, "layer_types": MIXED[::-1]}),
    "cohere2, biases": ("cohere2", {"sliding_window": 8, "attention_bias": True, "layer_types": MIXED[::-1]}),
    "lfm2": ("lfm2", {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "gemma4_text": ("gemma4_text", GEMMA4),
    "gemma4_text, as E4B": ("gemma4_text", GEMMA4_E),
    "gemma4_text, as E2B, tied": ("gemma4_text", GEMMA4_E | {"use_double_wide_mlp": True, "tie_word_embeddings": True}),
    "youtu": ("youtu", MLA),
    "glm": ("glm", {"head_dim": 8}),
    "glm, head_dim 12, tied, no biases": ("glm", {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": False}),
    "glm, all of each head rotated": ("glm", {"head_dim": 8, "partial_rotary_factor": 1.0}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma, tied, head_dim 12, gelu": ("gemma", {"head_dim": 12, "tie_word_embeddings": True, "hidden_act": "gelu"}),
}  # fmt: skip


def wrong_in_v4(base: DenseModel, moe: str) -> str:
    """What transformers 4.57 was measured to make of models of that kind in a family, if it is not right."""
    width = base.sizes["ffn"]
    plain = Shape(base.layers, width, (width,) * 2, (), 2, tuple(range(base.layers)), {})
    trouble = trouble_of("transformers", moe, facts_of(base, plain))
    return trouble.words if isinstance(trouble, Trouble) else ""


def total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Their sum."""
    return reduce(torch.add, parts)


class Mixture(torch.nn.Module):
    """FFNs behind a router, by their definition."""

    def __init__(
        self,
        ffns: Sequence[torch.nn.Module],
        rows: torch.Tensor,
        k: int,
        *,
        scoring: str,
        bias: torch.Tensor | None = None,
        shared: torch.nn.Module | None = None,
        shared_gate: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ffns, self.shared = torch.nn.ModuleList(ffns), shared
        self.rows, self.k, self.scoring, self.bias, self.shared_gate = rows, k, scoring, bias, shared_gate
        self.chosen = torch.zeros(len(ffns))

    def forward(self, states: torch.Tensor, *_: object) -> torch.Tensor:
        flat = states.flatten(0, -2)
        logits = flat @ self.rows.T
        scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        index = (scores if self.bias is None else scores + self.bias).topk(self.k, dim=-1).indices
        weights = scores.gather(-1, index)
        weights = torch.zeros_like(scores).scatter_(-1, index, weights / weights.sum(-1, keepdim=True))
        self.chosen += (weights > 0).sum(0)
        result = total(weights[:, [expert]] * ffn(flat) for expert, ffn in enumerate(self.ffns))
        if self.shared is not None:
            added = self.shared(flat)
            result = result + (added if self.shared_gate is None else added * (flat @ self.shared_gate.T).sigmoid())
        return result.reshape(states.shape)


class Sum(torch.nn.Module):
    """Several FFNs at once, each with its factor."""

    def __init__(self, ffns: Sequence[torch.nn.Module], scales: Sequence[float]) -> None:
        super().__init__()
        self.ffns, self.scales = torch.nn.ModuleList(ffns), scales

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return total(scale * ffn(states) for ffn, scale in zip(self.ffns, self.scales, strict=True))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    return tensors


@lru_cache(maxsize=8)
def _dense(folder: Path) -> Any:
    """A model that is not changed here; those of a kind are experts of one mixture after the other."""
    return load(folder)


def reference(plan: MergePlan, out: Path, routed_scale: float = 1.0, shared_scales: Sequence[float] = ()) -> Any:
    """The base as transformers computes it, each FFN replaced by a `Mixture` of the experts' own FFN modules."""
    family, module = plan.family, plan.base.family.ffn_module
    base = load(plan.sources[0].folder)
    others = [_dense(source.folder) for source in plan.sources[1:]]
    experts, shared = others[: len(plan.config.experts)], others[len(plan.config.experts) :]
    tensors = stored(out)
    for index in plan.mixture.moe_layers:
        prefix = f"model.layers.{index}."

        def ffn(model: Any, index: int = index) -> torch.nn.Module:
            own = DENSE_FAMILIES[model.config.model_type].ffn_module
            found: torch.nn.Module = copy.deepcopy(model.model.layers[index].get_submodule(own))
            return found

        gate = family.shared.gate if family.shared else ""
        bias = tensors.get(prefix + family.selection_bias) if family.selection_bias else None
        mixture = Mixture(
            [Sum([ffn(model)], [routed_scale]) for model in experts],
            tensors[prefix + family.router],
            plan.config.experts_per_token,
            scoring=family.scoring,
            bias=None if bias is None else bias.flatten(),
            shared=Sum([ffn(model) for model in shared], shared_scales) if shared else None,
            shared_gate=tensors.get(prefix + gate) if gate and shared else None,
        )
        base.model.layers[index].set_submodule(module, mixture)
    return base


def mixtures(model: Any) -> list[Mixture]:
    """The replaced FFNs."""
    return [module for module in model.modules() if isinstance(module, Mixture)]
