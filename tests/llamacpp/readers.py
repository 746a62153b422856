"""What llama.cpp gets wrong, as a table; all else it has to compute as transformers does."""

import math
from dataclasses import dataclass

# Of the largest logit, for what is right. All but gemma4_text are below 3e-6; its GELU comes from a table of float16.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """What happens to mixtures of a family of which all the words hold."""

    families: tuple[str, ...]
    words: tuple[str, ...]
    happens: str | float
    """A pattern of the message of the step that fails, or how far logits are apart, in parts of the largest."""


_GRANITES = ("granitemoe", "granitemoeshared", "granitemoehybrid")
_NO_OUTPUT = "engine: .*'output.weight' not found"
_NO_ROUTER = "engine: .*'blk.2.ffn_gate_inp.weight' not found"
_NARROW_HEADS = r"engine: .*'blk.0.attn_q.weight' has wrong shape"
_NO_WINDOW = r"engine: GGML_ASSERT\(hparams.is_swa_any\(\)\)"
# What is multiplied by a matrix without rows.
_EMPTY = r"engine: GGML_ASSERT\(!ggml_is_transposed\(a\)\)"
_WRONG_NUMBER = "engine: .*wrong number of tensors"

# The first that fits is what happens.
ROWS = (
    Row(("mixtral",), ("short window",), 0.95),
    Row(("mixtral", "granitemoe", "granitemoeshared"), ("mscale",), 0.5),
    Row(("mixtral", "granitemoe", "granitemoeshared"), ("longrope",), 1.4),
    Row(("glm4_moe",), ("mscale", "shared"), 0.5),
    Row(
        ("qwen2_moe", "qwen3_moe", "mellum"), ("dense layers",),
        "converter: ValueError: Can not map tensor 'model.layers.0.mlp.down_proj.weight'",
    ),
    Row(("qwen3_moe", "hunyuan_v1_moe"), ("qkv_bias",), _WRONG_NUMBER),
    Row(("cohere2_moe",), ("qkv_bias",), r"converter: TypeError: len\(\) of a 0-d tensor"),
    Row(_GRANITES, ("llama3",), "converter: .*Missing <MODEL_TENSOR.ROPE_FREQS"),
    Row(("granitemoehybrid",), ("no shared",), "converter: ValueError: not enough values to unpack"),
    Row(("granitemoehybrid",), ("state spaces", "positions"), 0.17),
    Row(("granitemoe", "granitemoeshared", "granitemoe_swa"), ("wide_heads",), _NARROW_HEADS),
    Row(("granitemoe_swa",), ("no window",), _NO_WINDOW),
    Row(("granitemoe_swa",), ("nope",), 1.0),
    Row(("glm4_moe", "solar_open"), ("no shared",), _WRONG_NUMBER),
    Row(("glm4_moe", "solar_open"), ("llama3",), 0.7),
    Row(("dots1", "mellum", "qwen2_moe"), ("tied",), _NO_OUTPUT),
    Row(("dots1",), ("grouped heads",), "engine: .*'blk.0.attn_k.weight' has wrong shape"),
    Row(("dots1",), ("no shared",), _EMPTY),
    Row(("dots1",), ("short window",), 0.5),
    Row(("qwen2_moe",), ("wide_heads",), _NARROW_HEADS),
    Row(("qwen2_moe",), ("no shared",), "engine: .*'blk.0.ffn_gate_shexp.weight' has wrong shape"),
    Row(("qwen2_moe",), (), math.nan),
    Row(("flex_olmo",), (), "converter: SystemExit: 1"),
    Row(("ernie4_5_moe",), ("shared",), "engine: .*'blk.0.ffn_gate_shexp.weight' has wrong shape"),
    Row(("cohere2_moe", "ernie4_5_moe"), ("dense layers after others",), _NO_ROUTER),
    Row(("cohere2_moe",), ("shared",), "converter: ValueError: Cohere2 MoE only supports average shared expert"),
    Row(("lfm2_moe",), ("untied",), "converter: ValueError: Can not map tensor 'lm_head.weight'"),
    Row(("deepseek_v3", "qwen3_5_moe_text"), ("no shared",), _EMPTY),
    Row(("mellum",), ("no window",), _NO_WINDOW),
    Row(("mellum",), ("yarn",), 0.45),
    Row(("exaone_moe",), ("dense layers after others",), "engine: .*'blk.1.ffn_gate.weight' not found"),
    Row(("exaone_moe",), ("no shared",), "engine: .*ffn_gate_shexp.weight' has wrong shape"),
    Row(("mimo_v2_flash",), (), "converter: KeyError: 'swa_head_dim'"),
)  # fmt: skip

# Of converters that have demands on the tokenizer, what they say to another.
WITHOUT_TOKENIZER = {
    "glm4_moe": r"converter: KeyError: '\[gMASK\]'",
    "solar_open": r"converter: KeyError: '<\|endoftext\|>'",
    "ernie4_5_moe": "converter: FileNotFoundError: File not found: .*tokenizer.model",
    "gemma4_text": "converter: FileNotFoundError: Cannot find Llama BPE tokenizer",
    "hunyuan_v1_moe": "converter: AttributeError: .* has no attribute mergeable_ranks",
}
FOREIGN_VOCAB = {"hunyuan_v1_moe"}
"""Families whose converter reads only a tokenizer that comes as Python code: here it reads it as most others do."""
OPTIONS = {"qwen3_5_moe_text": ("--no-mtp",)}
"""Without which a family's converter stops: it looks for layers that predict further tokens."""


def row_of(moe: str, words: frozenset[str]) -> Row | None:
    """What is said of such a mixture."""
    return next((row for row in ROWS if moe in row.families and words.issuperset(row.words)), None)
