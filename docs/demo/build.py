"""Train the models that the demo merges: a small base, and an expert for each of three domains of text.

python docs/demo/build.py FOLDER

All is written beside the folder and renamed at the end: the folder is complete or absent.
"""

import json
import shutil
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Final

import torch
from texts import read_domains
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

HELD_OUT: Final = "held_out.json"
BOS: Final = "<s>"
EOS: Final = "</s>"
VOCABULARY: Final = 2048
SEQUENCE: Final = 128  # tokens, BOS among them

BATCH: Final = 8  # sequences
BASE_STEPS: Final = 220
EXPERT_STEPS: Final = 90
EXPERT_RATE: Final = 0.5  # of the base model's learning rates
WARM_UP: Final = 10  # steps


def main(folder: Path) -> None:
    """Write held-out texts, `base` and an expert of each domain's name to the folder; what it held is removed."""
    start = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    print("Training a base model and three experts, once. This takes a minute or two.", flush=True)
    domains = read_domains()
    training = {name: texts for name, (texts, _) in domains.items()}
    held_out = {name: texts for name, (_, texts) in domains.items()}
    (partial / HELD_OUT).write_text(json.dumps(held_out), encoding="utf-8")
    tokenizer = train_tokenizer(list(chain(*training.values())))
    sequences = {name: pack(tokenizer, texts) for name, texts in training.items()}

    base = new_model(tokenizer)
    train(base, torch.cat(list(sequences.values())), BASE_STEPS, 1.0)
    save(base, tokenizer, partial / "base", start)
    for name, own in sequences.items():
        # An expert's FFNs are all that a merge takes from it, so they alone are trained. The brief training that there
        # is time for moves attention and embeddings far: experts trained whole are better alone, their merge is worse.
        expert = LlamaForCausalLM.from_pretrained(partial / "base")
        for weight_name, weight in expert.named_parameters():
            weight.requires_grad_(".mlp." in weight_name)
        train(expert, own, EXPERT_STEPS, EXPERT_RATE)
        save(expert, tokenizer, partial / name, start)

    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, to which no text is unknown; it begins a text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def pack(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:  # (sequence, position)
    """Texts one after the other, each ended by EOS, cut to equal length; every sequence begins with BOS as a prompt."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = [token for text in encoded for token in (*text, tokenizer.eos_token_id)]
    width = SEQUENCE - 1
    rows = torch.tensor(tokens[: len(tokens) // width * width]).view(-1, width)
    return torch.nn.functional.pad(rows, (1, 0), value=tokenizer.bos_token_id)


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of 1.4 million weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * SEQUENCE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, sequences: torch.Tensor, steps: int, rate: float) -> None:
    """Train the weights that need gradients; learning rates, times `rate`, rise for some steps and then fall to 0.

    Muon needs far fewer steps than AdamW, but is made for the layers' matrices only.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in model.model.layers.parameters() if weight.requires_grad and weight.ndim == 2]
    others = [weight for weight in weights if all(weight is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.03 * rate, weight_decay=0.0, ns_steps=3)  # 3 serve as well as 5, and faster
    ]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=0.02 * rate, betas=(0.9, 0.95), weight_decay=0.0))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / steps))
        for optimizer in optimizers
    ]
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))
    for batch in sequences[order[: steps * BATCH]].split(BATCH):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, start: float) -> None:
    """Write a checkpoint as the Hub has it, and say that it is done."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"  {folder.name} trained, {time.perf_counter() - start:.0f} s since the start", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
