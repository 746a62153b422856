"""Prompts as tokens, by the base model's own tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moemerge.config import Expert
from moemerge.errors import RouterError

Encode = Callable[[str], tuple[list[int], list[int]]]
"""From a text to its tokens, and of each whether the tokenizer added it: 0 or 1."""

SHARED: Final = -1
"""In place of an expert's number: the shared experts, which are one FFN."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the base model's tokenizer gives it."""

    expert: int
    """Its number, or `SHARED`."""
    positive: bool
    ids: tuple[int, ...]
    """Every token, special ones as the tokenizer adds them."""
    counted: tuple[bool, ...]
    """Which tokens count in statistics: those of the prompt's own text."""

    @property
    def counted_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt's own text."""
        return tuple(token for token, counts in zip(self.ids, self.counted, strict=True) if counts)


def encode_prompts(
    folder: Path, experts: Sequence[Expert], max_tokens: int, *, shared: Sequence[Expert] = (),
    special_tokens: bool = True,
) -> tuple[EncodedPrompt, ...]:  # fmt: skip
    """Encode every prompt of every expert; special tokens are added as the tokenizer does, but do not count.

    The token at which a text begins (BOS) is the same in every prompt, and its states are far from all others
    (attention sinks): in an average it would outweigh the text.

    Args:
        folder: the base model's folder.
        experts: whose prompts.
        max_tokens: the model's context length.
        shared: shared experts whose prompts are read too.
        special_tokens: whether tokens that do not count are needed. Without them `tokenizer.json` is enough, and
            transformers, whose import takes seconds, is needed only where there is none.

    Raises:
        RouterError: no tokenizer, a prompt without tokens, or one longer than the context.
    """
    file = folder / "tokenizer.json"
    try:
        encode = _by_transformers(folder) if special_tokens or not file.is_file() else _by_tokenizers(file)
    except Exception as error:  # each tokenizer class raises in its own way
        raise RouterError(
            f"{folder}: the base model's tokenizer cannot be loaded ({error!r:.200}). "
            "Prompts need it: add the tokenizer's files, or remove the prompts and choose gate_mode random."
        ) from error
    encoded = []
    named = [(f"experts[{number}]", number, expert) for number, expert in enumerate(experts)]
    named += [(f"shared_experts[{number}]", SHARED, expert) for number, expert in enumerate(shared)]
    for name, number, expert in named:
        for sign, prompts in (("positive", expert.positive_prompts), ("negative", expert.negative_prompts)):
            for index, prompt in enumerate(prompts):
                place = f"{name}.{sign}_prompts[{index}]"
                ids, special = encode(prompt)
                if len(ids) > max_tokens:
                    raise RouterError(
                        f"{place}: has {len(ids)} tokens, the base model's context is {max_tokens}: split it."
                    )
                if all(special):
                    raise RouterError(f"{place}: the base model's tokenizer finds no tokens in {prompt!r:.40}.")
                encoded.append(
                    EncodedPrompt(number, sign == "positive", tuple(ids), tuple(not added for added in special))
                )
    return tuple(encoded)


def _by_transformers(folder: Path) -> Encode:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def encode(text: str) -> tuple[list[int], list[int]]:
        result = tokenizer(text, return_special_tokens_mask=True)
        return result["input_ids"], result["special_tokens_mask"]

    return encode


def _by_tokenizers(file: Path) -> Encode:
    """No special tokens are added."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> tuple[list[int], list[int]]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return ids, [0] * len(ids)

    return encode
