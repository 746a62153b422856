"""Trains a small Mixtral from its start, on texts and a CPU, for what is said of trained mixtures to be tried on one.

    OMP_NUM_THREADS=1 python benchmarks/train_mixture.py OUT TEXT ... --test TEXT ... --minutes 20

OUT/trained is the model with its tokenizer, OUT/start the same before its first step. Texts are as for `moemerge eval`.
Steps are as many as the minutes allow, so that two runs with one seed may differ.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from table import machine
from tokenizers import ByteLevelBPETokenizer
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moemerge.chats import Chat
from moemerge.texts.documents import find_files, read_documents

END = "<|endoftext|>"
WINDOW, BATCH = 200, 4
RATE, DECAY, WARM_UP = 2e-3, 0.1, 0.05


def texts(patterns: list[str], place: str) -> list[str]:
    return [found for found in read_documents(find_files(patterns, place)) if not isinstance(found, Chat)]


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,  # noqa: SLF001  what transformers saves
        eos_token=END,
        pad_token=END,
        model_max_length=2048,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents' tokens (token,), each document with the end behind it."""
    ids = [[*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id] for document in documents]
    return torch.tensor([one for document in ids for one in document])


def build(vocabulary: int) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.01,
            max_position_embeddings=2048,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def rate(share: float) -> float:
    """The learning rate after a share of the time: it rises, and then falls as a cosine to a twentieth."""
    if share < WARM_UP:
        return RATE * (0.05 + share / WARM_UP)
    rest = (min(share, 1.0) - WARM_UP) / (1 - WARM_UP)
    return RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * rest)) / 2)


def loss_of(model: MixtralForCausalLM, ids: torch.Tensor) -> float:
    """Nats per token over at most 100 windows that are spread evenly over a text."""
    model.eval()
    starts = torch.linspace(0, len(ids) - WINDOW, min(100, len(ids) // WINDOW)).long().tolist()
    with torch.inference_mode():
        batches = [torch.stack([ids[start : start + WINDOW]]) for start in starts]
        losses = [float(model(batch, labels=batch, use_cache=False).loss) for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def train(model: MixtralForCausalLM, ids: torch.Tensor, minutes: float, seed: int) -> None:
    choice = random.Random(seed)  # noqa: S311  no secret
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    start, step, shown, losses = time.monotonic(), 0, 0.0, []
    while (passed := (time.monotonic() - start) / 60) < minutes:
        for group in optimizer.param_groups:
            group["lr"] = rate(passed / minutes)
        places = [choice.randrange(len(ids) - WINDOW) for _ in range(BATCH)]
        batch = torch.stack([ids[place : place + WINDOW] for place in places])
        output = model(batch, labels=batch, output_router_logits=True, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balance = float(output.aux_loss.detach())
        losses.append(float(output.loss.detach()) - model.config.router_aux_loss_coef * balance)
        step += 1
        if passed >= shown:
            mean = sum(losses) / len(losses)
            print(f"{passed:5.1f} min, step {step}: loss {mean:.3f}, balancing loss {balance:.3f}", flush=True)
            shown, losses = passed + minutes / 40, []
    print(f"{step} steps of {BATCH} x {WINDOW} tokens, {step * BATCH * WINDOW / len(ids):.1f} times the texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", nargs="+", help="to train on")
    parser.add_argument("--test", nargs="+", required=True, help="texts held out, for the loss before and after")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the text")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    documents = texts(options.texts, "texts")
    tokenizer = train_tokenizer(documents, options.vocabulary)
    ids, held_out = encode(tokenizer, documents), encode(tokenizer, texts(options.test, "--test"))
    model = build(len(tokenizer))
    print(machine(Path.cwd()))
    print(f"{sum(part.numel() for part in model.parameters())} parameters, {len(ids)} tokens, seed {options.seed}")
    for name in ("start", "trained"):
        if name == "trained":
            train(model, ids, options.minutes, options.seed)
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        seen, unseen = (loss_of(model, text) for text in (ids, held_out))
        print(f"{name}: loss {seen:.3f} on its texts, {unseen:.3f} on those held out", flush=True)


if __name__ == "__main__":
    main()
