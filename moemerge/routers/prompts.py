"""Prompts as tokens, by the base model's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from moemerge.config import Expert
from moemerge.errors import RouterError
from moemerge.routers.request import EncodedPrompt


def encode_prompts(folder: Path, experts: Sequence[Expert], max_tokens: int) -> tuple[EncodedPrompt, ...]:
    """Encode every prompt of every expert; special tokens are added as the tokenizer does, but do not count.

    The token at which a text begins (BOS) is the same in every prompt, and its states are far from all others
    (attention sinks): in an average it would outweigh the text.

    Args:
        folder: the base model's folder.
        experts: whose prompts.
        max_tokens: the model's context length.

    Raises:
        RouterError: no tokenizer, a prompt without tokens, or one longer than the context.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class raises in its own way
        raise RouterError(
            f"{folder}: the base model's tokenizer cannot be loaded ({error!r:.200}). "
            "Prompts need it: add the tokenizer's files, or remove the prompts and choose gate_mode random."
        ) from error
    encoded = []
    for number, expert in enumerate(experts):
        for sign, prompts in (("positive", expert.positive_prompts), ("negative", expert.negative_prompts)):
            for index, prompt in enumerate(prompts):
                place = f"experts[{number}].{sign}_prompts[{index}]"
                result = tokenizer(prompt, return_special_tokens_mask=True)
                ids, special = result["input_ids"], result["special_tokens_mask"]
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
