"""The mixtures that engines are tried with: kinds of dense models, in every output family that holds them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from moemerge.families.dense import DenseModel, read_dense
from moemerge.families.engines import facts_of
from moemerge.families.family import MoeFamily
from moemerge.families.mixture_shape import Mixture
from moemerge.families.multimodal import VISION_MIXTURES, VisionMixture, text_config
from moemerge.families.selection import MOE_FAMILIES
from tests.support.families import LLAMA3, MINISTRAL3, MIXED, WINDOWS, YARN
from tests.support.multimodal import KINDS as MULTIMODAL
from tests.support.multimodal import multimodal_config

EXPERTS, LAYERS, TEXT_LENGTH, VOCAB = 3, 3, 24, 512  # as many tokens as tests.support.sentencepiece_model has
# vLLM's attention wants heads of 32 or more; every other axis differs from each other.
SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
TIED: Final = {"tie_word_embeddings": True}
WIDE: Final = {"head_dim": 64}
WINDOW: Final = {"sliding_window": 8}
MUP: Final = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
LONGROPE: Final = {
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + i / 10 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
    },
}
LINEAR: Final = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
# Which changes nothing of texts that are shorter than this.
DYNAMIC: Final = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
HYBRID: Final = {
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
    "mamba_n_heads": 4,
    "mamba_expand": 2,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "layer_types": ["mamba", "attention", "attention"],
}
GEMMA4: Final = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB, "head_dim": 32, "global_head_dim": 64,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 0, **WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
QWEN3_5: Final = {
    "head_dim": 256,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MLA: Final = {
    "q_lora_rank": 24,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "pad_token_id": None,
}
AXES: Final = {
    "rope_theta": 5e6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
WIDE_AXES: Final = {"rope_theta": 5e6, "rope_scaling": {**AXES["rope_scaling"], "mrope_section": [12, 10, 10]}}
PARTIAL_AXES: Final = {
    "rope_parameters": {**WIDE_AXES["rope_scaling"], "rope_theta": 5e6, "partial_rotary_factor": 0.25}
}
MINICPM: Final = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32}
LFM2: Final = {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}
COHERE2: Final = {**WINDOW, "logit_scale": 0.25, "layer_types": MIXED[::-1]}

# A name, the model type and what its config says. The first of a type is the plainest.
KINDS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", TIED),
    "llama, tied, llama3 rope": ("llama", TIED | LLAMA3),
    "llama, wide heads": ("llama", WIDE),
    "llama, wide heads, yarn": ("llama", WIDE | YARN),
    "llama, yarn": ("llama", YARN),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, linear rope": ("llama", LINEAR),
    "llama, dynamic rope": ("llama", DYNAMIC),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", WINDOW),
    "mistral, wide heads, window": ("mistral", WINDOW | WIDE),
    "ministral, mixed windows": ("ministral", {"layer_types": MIXED, **WINDOW, "head_dim": 32}),
    "ministral3": ("ministral3", {"sliding_window": None, "head_dim": 32, **MINISTRAL3}),
    "phi3": ("phi3", {"sliding_window": None, "resid_pdrop": 0.0}),
    "phi3, longrope": ("phi3", {"sliding_window": None, **LONGROPE}),
    "phi3, partial rotary": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", TIED),
    "qwen2, tied, yarn": ("qwen2", TIED | YARN),
    "qwen2, mixed windows": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, gelu": ("qwen3", {"head_dim": 32, "hidden_act": "gelu"}),
    "qwen3, tied": ("qwen3", TIED | {"head_dim": 32}),
    "qwen3, wide heads": ("qwen3", WIDE),
    "qwen3, tied, wide heads": ("qwen3", TIED | WIDE),
    "qwen3, wide heads, yarn": ("qwen3", WIDE | YARN),
    "qwen3, biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3, mixed windows": ("qwen3", {"head_dim": 32, **WINDOWS}),
    "qwen3, ungrouped heads": ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}),
    "seed_oss, wide heads": ("seed_oss", WIDE),
    "smollm3, layers without positions": ("smollm3", {"no_rope_layers": [1, 0, 1], **TIED}),
    "granite": ("granite", MUP),
    "granite, tied, biases": ("granite", {**MUP, "attention_bias": True, **TIED}),
    "granite_swa": ("granite_swa", {**MUP, **WINDOW, "layer_types": MIXED}),
    "granitemoehybrid": ("granitemoehybrid", MUP | HYBRID),
    "granitemoehybrid, without positions": ("granitemoehybrid", MUP | HYBRID | {"position_embedding_type": "nope"}),
    "olmo2": ("olmo2", {}),
    "ernie4_5": ("ernie4_5", {"head_dim": 32}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 32}),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": False, **TIED}),
    "cohere, untied": ("cohere", {"logit_scale": 0.25, "use_qk_norm": False}),
    "cohere2": ("cohere2", COHERE2 | TIED),
    "cohere2, biases": ("cohere2", COHERE2 | TIED | {"attention_bias": True}),
    "lfm2": ("lfm2", LFM2),
    "lfm2, tied": ("lfm2", LFM2 | TIED),
    "qwen3_5_text": ("qwen3_5_text", QWEN3_5),
    "gemma4_text": ("gemma4_text", GEMMA4),
    "gemma4_text, tied": ("gemma4_text", GEMMA4 | TIED),
    "youtu": ("youtu", MLA),
    "glm": ("glm", {"head_dim": 32}),
    "glm, tied, no biases": ("glm", TIED | {"head_dim": 32, "attention_bias": False}),
    "gemma, tied": ("gemma", TIED | {"head_dim": 32}),
    "gemma, tied, wide heads": ("gemma", TIED | WIDE),
    # By other names, and inside multimodal models, without their towers and with them.
    "internlm2": ("internlm2", {"bias": False}),
    "minicpm, tied": ("minicpm", MINICPM | TIED),
    "minicpm, longrope": ("minicpm", MINICPM | LONGROPE | {"tie_word_embeddings": False}),
    "mistral3, wide heads": ("mistral3", {"sliding_window": None} | WIDE),
    "qwen3_vl": ("qwen3_vl", {"head_dim": 32, **AXES}),
    "qwen3_vl, wide heads": ("qwen3_vl", WIDE | WIDE_AXES),
    "qwen3_vl, tied, wide heads": ("qwen3_vl", TIED | WIDE | WIDE_AXES),
    "qwen3_5": ("qwen3_5", QWEN3_5 | PARTIAL_AXES),
    "qwen3_5, tied": ("qwen3_5", TIED | QWEN3_5 | PARTIAL_AXES),
    "gemma4, tied": ("gemma4", TIED | GEMMA4),
}

# Mixtures with shared experts, and with layers that stay dense: of these kinds, for other kinds add nothing new.
_WITH_SHARED: Final = {
    "llama", "llama, tied, llama3 rope", "llama, biases", "mistral, window", "qwen2", "qwen2, tied", "qwen3", "granite",
    "qwen3, tied, wide heads", "qwen3, tied", "qwen3, wide heads", "granite_swa", "granitemoehybrid", "granitemoehybrid, without positions", "ernie4_5",
    "hunyuan_v1_dense", "cohere2", "qwen3_5_text", "youtu", "qwen3, ungrouped heads", "granite, tied, biases",
    "llama, wide heads, yarn", "smollm3, layers without positions", "glm", "gemma, tied", "minicpm, tied", "qwen3_5",
}  # fmt: skip
_WITH_DENSE: Final = {"llama", "qwen2", "qwen3", "ernie4_5", "cohere2", "lfm2, tied", "youtu", "glm"}
# Of models that few have: in what most people merge into.
_UNUSUAL: Final = {"llama, linear rope", "llama, dynamic rope", "llama, gelu", "qwen3, gelu"}
_FOR_UNUSUAL: Final = {
    "mixtral",
    "qwen3_moe",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "granitemoe_swa",
    "glm4_moe",
}
_WITH_ABSENT: Final = {("llama", "glm4_moe"), ("qwen3", "glm4_moe"), ("qwen3, ungrouped heads", "dots1")}
# Facts of their mixtures are those of others, but in multimodal classes: tried all the same, in one family.
_RELATIVES: Final = {
    "internlm2": {"mixtral"},
    "mistral3, wide heads": {"mixtral"},
    "qwen3_vl": {"qwen3_moe"},
    "qwen3_vl, wide heads": {"qwen3_moe"},
    "qwen3_vl, tied, wide heads": {"qwen3_moe"},
    "qwen3_5": {"qwen3_5_moe_text"},
    "qwen3_5, tied": {"qwen3_5_moe_text"},
    "gemma4, tied": {"gemma4_text"},
}
# Of families that few engines read: enough to know that.
_RARE: Final = {"solar_open", "exaone_moe", "mimo_v2_flash", "hy_v3", "mellum", "dots1"}
_FOR_RARE: Final = {
    "llama", "qwen2", "qwen3", "qwen3, tied", "qwen3, wide heads", "qwen3, tied, wide heads", "qwen3, ungrouped heads", "qwen3, mixed windows",
    "llama, tied, llama3 rope",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A mixture of models of one kind in an output family."""

    kind: str
    family: str
    shared: bool
    """Whether there is a shared expert beside the others."""
    moe_layers: tuple[int, ...] = tuple(range(LAYERS))
    """The others stay dense."""
    has_absent: bool = False
    """Whether the last expert has no part in the first layer."""

    def __str__(self) -> str:
        layers = "" if len(self.moe_layers) == LAYERS else f", experts in layers {list(self.moe_layers)}"
        layers += ", an expert absent" if self.has_absent else ""
        return f"{self.kind} -> {self.family}{', a shared expert' if self.shared else ''}{layers}"

    @property
    def config(self) -> dict[str, Any]:
        """What the `config.json` of its models says."""
        model_type, sizes = KINDS[self.kind]
        if model_type not in MULTIMODAL:
            return {**SIZES, "model_type": model_type, **sizes}
        return multimodal_config(model_type, **sizes_of_text(self.kind))

    @property
    def base(self) -> DenseModel:
        """What moemerge knows of its models."""
        base = read_dense(text_config(self.config) or self.config)
        assert not isinstance(base, str), base
        return base

    @property
    def vision(self) -> VisionMixture | None:
        """The multimodal class that is the family, if it is one."""
        found = VISION_MIXTURES.get(KINDS[self.kind][0])
        return found if found and found.model_type == self.family else None

    @property
    def of_text(self) -> MoeFamily:
        """The family of its text model."""
        return MOE_FAMILIES[self.vision.family if self.vision else self.family]

    @property
    def mixture(self) -> Mixture:
        """Its shape."""
        width = SIZES["intermediate_size"]
        absent = {0: frozenset({EXPERTS - 1})} if self.has_absent else {}
        return Mixture(LAYERS, width, (width,) * EXPERTS, (width,) * self.shared, 2, self.moe_layers, absent)

    @property
    def facts(self) -> frozenset[str]:
        """What tells it from others, for engines."""
        return facts_of(self.base, self.mixture)

    @property
    def form(self) -> str:
        """A hash of what the family makes of it: another `config.json`, or names of tensors, have to be tried again."""
        config = self.of_text.config(self.base, self.mixture, "float32")
        if self.vision:
            config = self.vision.config(self.config, config)
        told = [config, sorted(self.of_text.experts), self.of_text.router]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def is_held(self) -> bool:
        """Whether moemerge makes such a mixture."""
        return not self.of_text.refusals(self.base, self.mixture)


def sizes_of_text(kind: str) -> dict[str, Any]:
    """What the config of the text model inside a multimodal one says."""
    sizes = {**SIZES, **KINDS[kind][1]}
    return {**sizes, "tied": sizes["tie_word_embeddings"]}


def cases() -> Iterator[Case]:
    """Every kind in every output family that holds it; some also with a shared expert, with dense layers, with an absent one."""
    for kind, (model_type, _) in KINDS.items():
        with_towers = [VISION_MIXTURES[model_type].model_type] if model_type in VISION_MIXTURES else []
        for family in [*MOE_FAMILIES, *with_towers]:
            if family not in _RELATIVES.get(kind, {family}) | {*with_towers}:
                continue
            if (family in _RARE and kind not in _FOR_RARE) or (kind in _UNUSUAL and family not in _FOR_UNUSUAL):
                continue
            found = [Case(kind, family, shared=False)]
            if kind in _WITH_SHARED:
                found.append(Case(kind, family, shared=True))
            if kind in _WITH_DENSE:
                found += [Case(kind, family, shared, layers) for shared in (False, True) for layers in ((1, 2), (1,))]
            if (kind, family) in _WITH_ABSENT:
                found.append(Case(kind, family, shared=False, has_absent=True))
            yield from (case for case in found if case.is_held)


def tried() -> Iterator[tuple[Case, bool]]:
    """The cases that engines are run over, with whether its facts are news: others have those of one before them."""
    known: set[tuple[str, frozenset[str]]] = set()
    for case in cases():
        is_new = (key := (case.family, case.facts)) not in known
        known.add(key)
        if is_new or case.kind in _RELATIVES:
            yield case, is_new
