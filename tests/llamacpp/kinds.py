"""The mixtures that llama.cpp is tried with, and each in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moemerge.formats import MOE_FAMILIES, Mixture, MoeFamily
from moemerge.formats.dense import DenseModel, read_dense
from tests.families import DENSE, HYBRID, MUP, WINDOWS, YARN
from tests.models import SIZES

EXPERTS, TEXT_LENGTH = 3, 24
KINDS: dict[str, tuple[str, dict[str, Any]]] = DENSE | {
    "llama, yarn": ("llama", YARN),
    "mistral, window longer than the text": ("mistral", {"sliding_window": 100}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, ungrouped heads": ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen3, ungrouped heads, mixed windows": ("qwen3", {"head_dim": 16, "num_key_value_heads": 4, **WINDOWS}),
    "qwen3, mixed windows": ("qwen3", {"head_dim": 16, **WINDOWS}),
    # Three parts of positions, as in the released models, do not fit into the rotary part of smaller heads.
    "qwen3_5_text": ("qwen3_5_text", DENSE["qwen3_5_text"][1] | {"head_dim": 256}),
    "seed_oss, head_dim 8": ("seed_oss", {"head_dim": 8}),
    "smollm3, windows": ("smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 8}),
    "granitemoehybrid, without positions": ("granitemoehybrid", MUP | HYBRID | {"position_embedding_type": "nope"}),
    "lfm2, tied": ("lfm2", DENSE["lfm2"][1] | {"tie_word_embeddings": True}),
    "gemma4_text, tied": ("gemma4_text", DENSE["gemma4_text"][1] | {"tie_word_embeddings": True}),
}  # fmt: skip
PLAINEST = set({model_type: kind for kind, (model_type, _) in reversed(KINDS.items())}.values())

# What a family's converter has to find in the tokenizer: tokens, or a SentencePiece model. Where none of this is said,
# it is content with any tokenizer whose way of splitting texts it knows.
SENTENCEPIECE = "tokenizer.model"
TOKENIZERS: dict[str, tuple[str, ...] | str] = {
    "glm4_moe": ("[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>"),
    "solar_open": ("<|startoftext|>", "<|endoftext|>", "<unk>"),
    "ernie4_5_moe": SENTENCEPIECE,
    "gemma4_text": SENTENCEPIECE,
}
VOCAB = 512
"""Of models whose tokenizer is a SentencePiece model: it has a token for every byte."""


@dataclass(frozen=True)
class Case:
    """A mixture of models of one kind in an output family."""

    kind: str
    moe: str
    shared: bool
    """Whether there is a shared expert beside the others."""
    moe_layers: tuple[int, ...] = (0, 1, 2)
    """The others stay dense."""

    def __str__(self) -> str:
        layers = "" if len(self.moe_layers) == 3 else f", experts in layers {list(self.moe_layers)}"
        return f"{self.kind} -> {self.moe}{', a shared expert' if self.shared else ''}{layers}"

    @property
    def model_type(self) -> str:
        return KINDS[self.kind][0]

    @property
    def sizes(self) -> dict[str, Any]:
        vocab = {"vocab_size": VOCAB} if TOKENIZERS.get(self.moe) == SENTENCEPIECE else {}
        if self.moe == "gemma4_text":
            vocab["vocab_size_per_layer_input"] = VOCAB
        return {**KINDS[self.kind][1], **vocab}

    @property
    def words(self) -> frozenset[str]:
        """The base's facts, in the words of `MoeFamily.notes`, and others that matter to llama.cpp."""
        base = read(self.kind)
        config = base.config
        rope = config.get("rope_scaling") or {}
        said = {
            "untied": "tied" not in base.facts,
            "shared": self.shared,
            "no shared": not self.shared,
            "dense layers": len(self.moe_layers) < base.layers,
            "dense layers after others": base.layers - 1 not in self.moe_layers,
            "short window": "window" in base.facts and config["sliding_window"] < TEXT_LENGTH,
            "no window": "window" not in base.facts,
            "grouped heads": base.sizes["key"] < base.sizes["query"],
            "llama3": rope.get("rope_type") == "llama3",
            "yarn": rope.get("rope_type") == "yarn",
            "longrope": rope.get("rope_type") == "longrope",
            "mscale": "mscale" in rope,
            "state spaces": "mamba_n_heads" in config,
            "no state spaces": "mamba_n_heads" not in config,
            "positions": config.get("position_embedding_type") == "rope",
        }
        return base.facts | {word for word, holds in said.items() if holds}


def read(kind: str) -> DenseModel:
    """What moemerge knows of a kind."""
    model_type, sizes = KINDS[kind]
    base = read_dense({**SIZES, "model_type": model_type, **sizes})
    assert not isinstance(base, str), base
    return base


def holds(family: MoeFamily, case: Case) -> bool:
    """Whether moemerge makes such a mixture."""
    base = read(case.kind)
    width = base.sizes["ffn"]
    mixture = Mixture(
        base.layers, width, (width,) * EXPERTS, (width,) * case.shared, 2, case.moe_layers, {},
    )  # fmt: skip
    return not family.refusals(base, mixture)


# A few kinds are enough for families of which llama.cpp gets little right, or that differ from another in little.
_SELDOM = {"qwen2_moe", "solar_open", "exaone_moe", "mimo_v2_flash", "granitemoe_swa", "granitemoehybrid"}
_FOR_THOSE = {
    "llama", "llama, head_dim 12, yarn", "llama, tied, llama3 rope", "qwen2", "qwen2, tied", "qwen2, mixed windows",
    "qwen3", "mistral, window longer than the text", "smollm3, windows", "smollm3, layers without positions",
    "granite", "granite_swa", "granitemoehybrid", "granitemoehybrid, without positions", "ministral, mixed windows",
}  # fmt: skip
_WITH_DENSE_LAYERS = {
    "llama", "qwen2", "qwen3", "qwen3, ungrouped heads", "ernie4_5", "cohere2", "lfm2, tied", "youtu",
}  # fmt: skip
_BETTER_WITH_SHARED = {"glm4_moe", "dots1", "deepseek_v3", "hy_v3"}


def cases() -> Iterator[Case]:
    """Every kind in every output family; the plainest of each type also with a shared expert, some with dense layers."""
    for kind in KINDS:
        for moe, family in MOE_FAMILIES.items():
            if moe in _SELDOM and kind not in _FOR_THOSE:
                continue
            found = [Case(kind, moe, shared=False)]
            if kind in PLAINEST | {"llama, tied, llama3 rope"} or kind not in DENSE:
                found.append(Case(kind, moe, shared=True))
            if kind in _WITH_DENSE_LAYERS:
                found += [Case(kind, moe, moe in _BETTER_WITH_SHARED, layers) for layers in ((1, 2), (1,))]
            yield from (case for case in found if holds(family, case))
