"""Models that people merge, with what their `config.json` says of computation, and the mixtures that they become."""

from dataclasses import dataclass
from typing import Any, Final

from moemerge.engines import Engine
from moemerge.errors import IncompatibleError
from moemerge.families.dense import read_dense
from moemerge.families.mixture_shape import Mixture
from moemerge.families.multimodal import text_alone
from moemerge.families.selection import select_family

# Facts depend on how these compare with each other, not on how large they are.
_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16, "max_position_embeddings": 256,
    "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
_TIED: Final = {"tie_word_embeddings": True}
_WIDE: Final = {"head_dim": 32}
_WINDOW: Final = {"sliding_window": 64}
_LLAMA3: Final = {
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}  # fmt: skip
_LONGROPE: Final = {
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
_DYNAMIC: Final = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
_MINISTRAL3: Final = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }
}  # fmt: skip
_GRANITE: Final = {
    "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "logits_scaling": 16.0,
}  # fmt: skip
_MIXED: Final = {"layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]}
_GEMMA4: Final = {
    **_TIED, **_WINDOW, **_MIXED, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
}  # fmt: skip
_GEMMA4_E: Final = {
    **_TIED, **_WINDOW, "head_dim": 16, "global_head_dim": 32, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
}  # fmt: skip
_HYBRID: Final = {"num_local_experts": 0, "shared_intermediate_size": 96, **_TIED, **_GRANITE}
_MINICPM: Final = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}

# A name, the model type of the text model, and what its config.json says beside sizes.
_MODELS: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("Llama 3.1 8B, 3.3 70B", "llama", _LLAMA3),
    ("Llama 3.2 1B, 3B", "llama", _LLAMA3 | _TIED),
    ("Llama 2, TinyLlama, Yi 1.5, Falcon 3", "llama", {}),
    ("SmolLM2", "llama", _TIED),
    ("Mistral 7B v0.1, Zephyr", "mistral", _WINDOW),
    ("Mistral 7B v0.2, v0.3", "mistral", {}),
    ("Mistral Nemo 12B, Mistral Small 3.2 24B", "mistral", _WIDE),
    ("Ministral 3 8B", "ministral3", _MINISTRAL3),
    ("Qwen2.5 7B and larger, Coder, Math", "qwen2", {}),
    ("Qwen2.5 0.5B to 3B", "qwen2", _TIED),
    ("Qwen3 8B, 14B, Qwen3-VL 8B", "qwen3", {}),
    ("Qwen3 1.7B", "qwen3", _TIED),
    ("Qwen3 0.6B, 4B", "qwen3", _TIED | _WIDE),
    ("Qwen3 32B", "qwen3", _WIDE),
    ("Qwen3.5 9B", "qwen3_5_text", {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
    ("Gemma 4 12B", "gemma4_unified_text", _GEMMA4),
    ("Gemma 4 E2B", "gemma4_text", _GEMMA4_E | {"use_double_wide_mlp": True}),
    ("Gemma 4 E4B", "gemma4_text", _GEMMA4_E),
    ("Gemma 2B", "gemma", _TIED),
    ("Gemma 7B", "gemma", _TIED | _WIDE),
    ("GLM-4-9B, the -hf checkpoints", "glm", {}),
    ("Phi-3 mini 4k", "phi3", _WINDOW),
    ("Phi-3 mini 128k", "phi3", _LONGROPE),
    ("Phi-4 14B", "phi3", {}),
    ("Granite 3 8B", "granite", _GRANITE | _TIED),
    (
        "Granite 4.0 Micro", "granitemoehybrid",
        _HYBRID | {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    ),
    ("Granite 4.0 H Micro", "granitemoehybrid", _HYBRID | {"layer_types": ["mamba"] * 3 + ["attention"]}),
    ("SmolLM3 3B", "smollm3", _TIED),
    ("OLMo 2", "olmo2", {}),
    ("ERNIE 4.5 0.3B", "ernie4_5", _TIED),
    ("Command R7B", "cohere2", _TIED | _WINDOW | _MIXED),
    ("Aya Expanse 8B", "cohere", _TIED),
    ("LFM2", "lfm2", _TIED | {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    ("MiniCPM 2B", "minicpm", _MINICPM | _TIED),
    ("MiniCPM4 8B", "minicpm", _MINICPM | _LONGROPE | {"max_position_embeddings": 64}),
    ("InternLM 2.5 7B, InternLM3 8B", "internlm2", _DYNAMIC | {"bias": False}),
    ("EXAONE 3.5 7.8B", "exaone", _LLAMA3 | {"num_layers": 4}),
    ("Baichuan2 7B", "baichuan", {"z_loss_weight": 0, "num_key_value_heads": 4}),
    ("MiMo 7B", "mimo", {}),
    ("Seed-OSS 36B", "seed_oss", _WIDE),
)  # fmt: skip


@dataclass(frozen=True)
class Becomes:
    """The output family that a merge gets, and the engines that were measured to compute it rightly."""

    family: str
    """Empty where no family holds it."""
    right_in: tuple[Engine, ...] = ()
    untried: tuple[Engine, ...] = ()
    """Engines that were not tried with such a mixture."""


@dataclass(frozen=True)
class KnownModel:
    """What models of a name become."""

    name: str
    model_type: str
    plain: Becomes
    shared: Becomes
    """With a shared expert."""
    upper: Becomes
    """With experts in the upper half of the layers alone."""


def known_models() -> list[KnownModel]:
    """List what well-known models become, by the rules of a merge without `architecture` and `engine`."""
    found = []
    for name, model_type, keys in _MODELS:
        config = {**_SIZES, **keys, "model_type": model_type}
        plain, shared, upper = (
            _becomes(config, shared, layers) for shared, layers in ((0, (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (0, (2, 3)))
        )
        found.append(KnownModel(name, model_type, plain, shared, upper))
    return found


def _becomes(config: dict[str, Any], shared: int, layers: tuple[int, ...]) -> Becomes:
    base = read_dense(text_alone(config))
    if isinstance(base, str):
        raise TypeError(base)
    width = max(base.ffn_widths)
    try:
        choice = select_family(base, Mixture(base.layers, width, (width,) * 4, (width,) * shared, 2, layers, {}))
    except IncompatibleError:
        return Becomes("")
    return Becomes(choice.family.model_type, choice.right_in, choice.untried)
