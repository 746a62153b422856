"""Mixtral, in the layout of mistralai/Mixtral-8x7B-v0.1: read by transformers 4 and 5, vLLM, llama.cpp and mlx-lm.

transformers 5 names the tensors differently in memory; written that way, transformers 4 loads random experts with no
more than a warning.
"""

from typing import Final

from moemerge.formats.family import MoeFamily

_BLOCK: Final = "model.layers.{layer}.block_sparse_moe."

MIXTRAL: Final = MoeFamily(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    takes=("llama", "mistral"),
    experts={
        "gate": _BLOCK + "experts.{expert}.w1.weight",
        "up": _BLOCK + "experts.{expert}.w3.weight",
        "down": _BLOCK + "experts.{expert}.w2.weight",
    },
    router=_BLOCK + "gate.weight",
    holds_shared_experts=False,
    carried=(
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
        "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
        "attention_dropout",
    ),
    fixed={"output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
    experts_key="num_local_experts",
    experts_per_token_key="num_experts_per_tok",  # noqa: S106  not a password
    required={
        "attention_bias": (False, "it has no attention biases"),
        "mlp_bias": (False, "its experts have no biases"),
        "partial_rotary_factor": (1.0, "it rotates whole heads"),
    },
)  # fmt: skip
