"""Models whose vocabulary is a base's with more tokens, as fine-tunes for chats have them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import edit_json

CHATML = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_tokens(
    model: Path, folder: Path, tokens: Sequence[str] = CHATML, *, template: str | None = TEMPLATE, seed: int = 0
) -> Path:
    """Copy a model with more tokens, and rows for them, as transformers adds both; with the template its eos changes."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if template:
        tokenizer.chat_template = template
        tokenizer.eos_token = tokens[-1]
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    rows, dtype = loaded.get_input_embeddings().weight.shape[0], loaded.dtype
    if len(tokenizer) > rows:
        loaded.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
            for token in tokenizer.convert_tokens_to_ids(list(tokens)):
                module.weight[token] = 0.5 * torch.randn(module.weight.shape[1], generator=generator).to(dtype)
    loaded.save_pretrained(folder)
    return folder
