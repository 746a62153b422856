"""Tiny real models for tests: transformers' own classes with weights large enough that every part matters."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moemerge.routers.pass_inputs import RouterInputs
from moemerge.routers.prompts import EncodedPrompt

TEXT = """The quick brown fox jumps over the lazy dog. def main(argv): return [item for item in argv if item]
Le chat dort sur le tapis et la souris danse. Integrate x squared from zero to one. 0 1 2 3 4 5 6 7 8 9"""
VOCAB = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = (["The fox jumps.", "The lazy dog"], ["def main(argv): return argv"], ["Le chat dort sur le tapis et danse"])


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts a BOS token in front, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(set(TEXT) - {" ", "\n"})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT.split("\n"), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model(
    folder: Path,
    seed: int = 0,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    tuned_from: int | None = None,
    **sizes: Any,
) -> Path:
    """Save a random model with its tokenizer, or one near to that of another seed; equal arguments give equal bytes."""
    key = repr((seed, model_type, dtype, tuned_from, sizes))
    if key not in _MADE:
        made = Path(_home().name) / str(len(_MADE))
        _make(made, seed, AutoConfig.for_model(model_type, **{**SIZES, **sizes}), dtype, tuned_from)
        _MADE[key] = made
    # Copies are as new as if they were made now.
    shutil.copytree(_MADE[key], folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return folder


_MADE: dict[str, Path] = {}
"""What this process has made, by the arguments."""


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="moemerge-models-")


def _make(folder: Path, seed: int, config: Any, dtype: torch.dtype, tuned_from: int | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    origin = None if tuned_from is None else torch.Generator().manual_seed(tuned_from)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if origin:
                noise = torch.randn(parameter.shape, generator=origin) + 0.2 * noise
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 0.2))
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    # As most models name it; transformers 5 reads that mixture by its own class, whatever is named.
    name = "Qwen3_5Tokenizer" if config.model_type == "qwen3_5_text" else "PreTrainedTokenizerFast"
    edit_json(folder / "tokenizer_config.json", tokenizer_class=name)


def write_config(
    path: Path, base: Path | str, experts: Sequence[Path | str], *, prompts: bool = True, **keys: Any
) -> Path:
    """Write a merge config: `hidden` with different prompts for each expert, or random routers without any."""
    document = {
        "base_model": str(base),
        "experts": [
            {"source_model": str(expert)}
            | ({"positive_prompts": PROMPTS[number % len(PROMPTS)] + [f"item {number}"]} if prompts else {})
            for number, expert in enumerate(experts)
        ],
        "gate_mode": "hidden" if prompts else "random",
        **keys,
    }
    path.write_text(yaml.safe_dump(document))
    return path


def load(folder: Path, **keys: Any) -> Any:
    """Load a checkpoint in float32; every tensor has to find its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, attn_implementation="eager", **keys
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def token_ids(length: int = 24) -> torch.Tensor:
    """(2, length) tokens."""
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any, length: int = 24) -> torch.Tensor:
    """(2, length, vocab) logits of the same tokens for every model."""
    found: torch.Tensor = model(token_ids(length), use_cache=False).logits.float()
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def router_inputs(
    states: torch.Tensor, experts: list[int], positive: list[bool] | None = None, documents: list[int] | None = None
) -> RouterInputs:
    """Router inputs of layer 0, each token a prompt of its own, or of the documents that are named."""
    signs, numbers = positive or [True] * len(experts), documents or list(range(len(experts)))
    prompts = tuple(
        EncodedPrompt(expert, sign, (3,), (True,), number)
        for expert, sign, number in zip(experts, signs, numbers, strict=True)
    )
    return RouterInputs(0, states, torch.arange(len(states)), prompts, states)


def edit_json(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    document = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model, whatever files they are in."""
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Give a model other tensors, all in one file."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
