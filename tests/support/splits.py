"""Byte-level tokenizers that split texts as those of released models do, each with a small vocabulary of its own."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 600
# The regular expressions of released tokenizer.json files, letter for letter.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


def _splitting(*patterns: str) -> list[Any]:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
DIGITS = [pre_tokenizers.Digits(individual_digits=True), *GPT2]
WAYS: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "gpt-2": (GPT2, ()),
    "smollm": (DIGITS, ()),
    "refact": (DIGITS, ("<fim_prefix>",)),
    "llama-bpe": (_splitting(LLAMA3), ()),
    "glm4": (_splitting(LLAMA3), ("[gMASK]",)),
    "qwen2": (_splitting(QWEN2), ()),
    "deepseek-r1-qwen": (_splitting(QWEN2), ("<\uff5cbegin\u2581of\u2581sentence\uff5c>",)),
    "qwen35": (_splitting(QWEN35), ()),
    "tekken": (_splitting(TEKKEN), ()),
    "gpt-4o": (_splitting(GPT4O), ()),
    "deepseek-v3": (_splitting(r"\p{N}{1,3}", CJK, DEEPSEEK3), ()),
}
"""By llama.cpp's name: what splits texts, and tokens by which the tokenizer is told from its namesakes."""


@cache
def byte_level(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits texts as one of `WAYS`, and puts a BOS token in front."""
    parts, marks = WAYS[name]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC() if "qwen" in name else None
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    special = ["<pad>", "<s>", "</s>", *marks]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 6,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "\n".join(topics.values())[:60_000]
    bpe.train_from_iterator(text.split("\n\n"), trainer)
    bpe.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|plain|>", normalized=False)])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(name: str, folder: Path) -> None:
    """Put such a tokenizer into a model's folder, in place of its own."""
    byte_level(name).save_pretrained(folder)
