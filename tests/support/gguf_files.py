"""Dense models as GGUF files, written by the package gguf with llama.cpp's names and order of rows."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.support.models import load_weights

_TURNED = ("llama", "granite", "smollm3")
_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def write_gguf(
    folder: Path, file: Path, kind: str = "F32", *, settings: dict[str, Any] | None = None, parts: int = 0
) -> Path:
    """Write a model's folder as a GGUF file, its matrices as `kind`; blocks that the package cannot make are random.

    `settings` are added, or leave a setting out where they are None; with `parts`, the tensors are in so many files.
    """
    config = json.loads((folder / "config.json").read_text())
    name = config["model_type"]
    tensors = load_weights(folder)
    most = -(-(len(tensors) + 1) // parts) if parts else 0
    writer = gguf.GGUFWriter(None if parts else file, name, split_max_tensors=most)
    for key, value in (_settings(name, config) | _tokens(folder) | (settings or {})).items():
        if value is not None:
            _add(writer, key, value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, own in gguf.MODEL_ARCH_NAMES.items() if own == name), config["num_hidden_layers"]
    )
    generator = np.random.default_rng(0)
    for own, tensor in tensors.items():
        stem, _, ending = own.rpartition(".")
        called = f"{names.get_name(stem)}.{ending}"
        rows = turned(own, tensor, config) if name in _TURNED else tensor
        quantised = kind if rows.dim() > 1 else "F32"
        type_ = gguf.GGMLQuantizationType[quantised]
        writer.add_tensor(called, blocks(rows.float().numpy(), type_, generator), raw_dtype=type_)
    if (rope := config.get("rope_scaling") or config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, *(rope[key] for key in _LLAMA3)))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def turned(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Put the rows of each query and key head into pairs of neighbours, one of each half of the head."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = next((key for part, key in heads.items() if f".{part}." in name), None)
    if key is None:
        return tensor
    return torch.cat(
        [torch.stack(list(head.chunk(2)), dim=1).flatten(0, 1) for head in tensor.chunk(config[key], dim=0)]
    )


def blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType, generator: np.random.Generator) -> np.ndarray:
    """Numbers as blocks of a type; of a type that the package does not quantise to, random blocks of finite numbers."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values.shape, kind, generator)


def random_blocks(
    shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, generator: np.random.Generator
) -> np.ndarray:
    """Blocks of random bytes that stand for numbers below 100."""
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    wanted = int(np.prod(shape)) // numbers
    found = np.empty((0, nbytes), np.uint8)
    while len(found) < wanted:
        drawn = generator.integers(0, 256, (4 * wanted, nbytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            meant = gguf.dequantize(drawn, kind)
        found = np.concatenate([found, drawn[(np.abs(meant) < 100).all(-1)]])
    return found[:wanted].reshape(*shape[:-1], -1)


def llama3_factors(config: dict[str, Any], factor: float, low: float, high: float, original: int) -> np.ndarray:
    """The divisors of llama3's frequencies, as the scaling's definition has them, one after the other."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    found = []
    for number in range(width // 2):
        length = 2 * np.pi * theta ** (2 * number / width)
        smooth = min(max((original / length - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def _settings(name: str, config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    own = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope.get("rope_theta") or config["rope_theta"]),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
    }
    own |= {key: config[scale] for key, scale in _SCALES.items() if scale in config}
    if rope.get("rope_type") == "yarn":
        own |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    return {f"{name}.{key}": value for key, value in own.items()}


def _tokens(folder: Path) -> dict[str, Any]:
    """The vocabulary of `tests.support.models.tokenizer`, byte-level and without types of its tokens."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | special
    vocabulary = sorted(ids, key=ids.get)
    missing = [f"[PAD{number}]" for number in range(len(vocabulary), config["vocab_size"])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary + missing,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary] + [5] * len(missing),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
