"""Write a base and experts of a real model's shape, with weights that a forward pass survives and no meaning.

    python benchmarks/make_models.py FOLDER --shape 1b --experts 4

Equal arguments give equal bytes. Weights are cut from one block of normal numbers, each tensor's at its own offset, so
that writing costs no more than the disk. `--sparse` writes headers and holes: for plans and memory, not for speed.
"""

import argparse
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from moemerge.checkpoint.header import build_header
from moemerge.checkpoint.index import SAFETENSORS_INDEX, SINGLE_SAFETENSORS, build_index
from moemerge.checkpoint.numbers import stored_bytes
from moemerge.dtypes import BITS, CONFIG_DTYPES, HeaderDType

SHAPES = {
    # To try the programs themselves, TinyLlama-1.1B with fewer layers, then itself, Mistral-7B and Llama-2-70B
    "tiny": {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2000,
    },
    "slim": {"num_hidden_layers": 6, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4},
    "1b": {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4},
    "7b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8},
    "70b": {
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
DTYPES: dict[str, HeaderDType] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
ONE = {"BF16": b"\x80\x3f", "F16": b"\x00\x3c", "F32": b"\x00\x00\x80\x3f"}
FILE_BYTES = 5_000_000_000
BLOCK_ELEMENTS = 2**25
SCALE = 0.02
VOCABULARY = 1500  # of the tokenizer: 1.3 tokens for a word of prompts.py, as real ones make


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {
            f"{name}input_layernorm.weight": (hidden,),
            f"{name}self_attn.q_proj.weight": (hidden, hidden),
            f"{name}self_attn.k_proj.weight": (keys, hidden),
            f"{name}self_attn.v_proj.weight": (keys, hidden),
            f"{name}self_attn.o_proj.weight": (hidden, hidden),
            f"{name}post_attention_layernorm.weight": (hidden,),
            f"{name}mlp.gate_proj.weight": (ffn, hidden),
            f"{name}mlp.up_proj.weight": (ffn, hidden),
            f"{name}mlp.down_proj.weight": (hidden, ffn),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def block(dtype: HeaderDType) -> memoryview:
    """`BLOCK_ELEMENTS` normal numbers as bytes."""
    numbers = np.random.default_rng(0).standard_normal(BLOCK_ELEMENTS, dtype=np.float32) * np.float32(SCALE)
    return memoryview(stored_bytes(numbers, CONFIG_DTYPES[dtype]))


def write_model(folder: Path, shape: str, dtype: HeaderDType, numbers: memoryview | None) -> int:
    """Write one model; without numbers its tensors are holes."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = COMMON | SHAPES[shape] | {"torch_dtype": CONFIG_DTYPES[dtype]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    width = BITS[dtype] // 8
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in tensor_shapes(config).items():
        nbytes = int(np.prod(size)) * width
        if filled + nbytes > FILE_BYTES:
            files.append({})
            filled = 0
        files[-1][name] = size
        filled += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files, start=1):
        single = len(files) == 1
        file_name = SINGLE_SAFETENSORS if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        table = [(name, dtype, size, int(np.prod(size)) * width) for name, size in tensors.items()]
        header = build_header(table, {"format": "pt"})
        with (folder / file_name).open("wb", buffering=0) as file:
            file.write(header)
            end = len(header)
            for name, _, size, nbytes in table:
                if numbers is not None:
                    write_tensor(file.fileno(), f"{folder.name} {name}", dtype, size, numbers)
                end += nbytes
            file.truncate(end)
        weight_map |= dict.fromkeys(tensors, file_name)
        total += end - len(header)
    if len(files) > 1:
        (folder / SAFETENSORS_INDEX).write_text(build_index(weight_map, total))
    return total


def write_tensor(file: int, seed: str, dtype: HeaderDType, size: tuple[int, ...], numbers: memoryview) -> None:
    if len(size) == 1:  # norms
        os.write(file, ONE[dtype] * size[0])
        return
    offset = zlib.crc32(seed.encode()) % (BLOCK_ELEMENTS // 2) * (BITS[dtype] // 8)
    nbytes = int(np.prod(size)) * (BITS[dtype] // 8)
    while nbytes:
        nbytes -= os.write(file, numbers[offset : offset + min(nbytes, len(numbers) - offset)])
        offset = 0


def write_tokenizer(folder: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [Path(__file__), Path(__file__).with_name("prompts.py")]
    bpe.train_from_iterator([path.read_text(encoding="utf-8") for path in texts], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_models(
    folder: Path, shape: str, experts: int, dtype: HeaderDType = "BF16", *, sparse: bool = False
) -> list[Path]:
    """The base's folder, then the experts'."""
    numbers = None if sparse else block(dtype)
    folders = [folder / "base", *(folder / f"expert{number}" for number in range(experts))]
    start = time.perf_counter()
    total = sum(write_model(model, shape, dtype, numbers) for model in folders)
    write_tokenizer(folders[0])
    print(f"{folder}: {total / 1e9:.1f} GB, {total / 1e6 / (time.perf_counter() - start):.0f} MB/s")
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--sparse", action="store_true", help="headers and holes, no numbers")
    options = parser.parse_args()
    make_models(options.folder, options.shape, options.experts, DTYPES[options.dtype], sparse=options.sparse)


if __name__ == "__main__":
    main()
