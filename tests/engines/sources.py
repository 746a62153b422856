"""The models that are merged for engines: of each kind in the layout that its checkpoints have."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer

from tests.engines.cases import KINDS, SIZES, sizes_of_text
from tests.support.models import load_weights, make_model, save_weights
from tests.support.multimodal import KINDS as MULTIMODAL
from tests.support.multimodal import make_multimodal
from tests.support.sentencepiece_model import save_sentencepiece

_SENTENCEPIECE: Final = frozenset({"ernie4_5", "gemma", "gemma4", "gemma4_text"})
"""Model types whose models bring a SentencePiece tokenizer, as some converters want."""
_RENAMED: Final = ("internlm2", "minicpm")
"""Model types that are Llamas under other names, but for what `config.json` says."""
_GLM_TOKENS: Final = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
_INTERNLM2: Final = {
    "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    "embed_tokens": "tok_embeddings", "lm_head": "output",
}  # fmt: skip


def make_source(folder: Path, kind: str, seed: int) -> Path:
    """Save a model of a kind; models of different seeds differ in their weights alone."""
    model_type, sizes = KINDS[kind]
    if model_type in MULTIMODAL:
        make_multimodal(folder, model_type, seed, **sizes_of_text(kind))
    elif model_type in _RENAMED:
        _make_renamed(folder, model_type, seed, {**SIZES, **sizes})
    else:
        make_model(folder, seed, model_type, **{**SIZES, **sizes})
    if model_type in _SENTENCEPIECE:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        save_sentencepiece(folder)
    if model_type == "glm":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(_GLM_TOKENS), special_tokens=True)
        tokenizer.save_pretrained(folder)
    return folder


def _make_renamed(folder: Path, model_type: str, seed: int, config: dict[str, Any]) -> None:
    """Save a Llama under the names of a type, with what its config says."""
    make_model(folder, seed, **{**SIZES, "tie_word_embeddings": config["tie_word_embeddings"]})
    if model_type == "internlm2":
        save_weights(folder, _as_internlm2(load_weights(folder)))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "rms_norm_eps": 1e-6}))


def _as_internlm2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors, those of queries, keys and values fused: for each key head its queries', the key, the value."""
    renamed = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            key, value = (tensors[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
            groups = [part.unflatten(0, (SIZES["num_key_value_heads"], -1)) for part in (tensor, key, value)]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(groups, 1).flatten(0, 1)
        elif "k_proj" not in name and "v_proj" not in name:
            own = next((name.replace(*pair) for pair in _INTERNLM2.items() if pair[0] in name), name)
            renamed[own] = tensor
    return renamed
