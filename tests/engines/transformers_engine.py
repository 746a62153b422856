"""transformers, in another version than the one whose numbers are compared with."""

from pathlib import Path

import numpy as np
import torch
import transformers
from towers import has_towers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def version() -> str:
    """Name and version of the engine."""
    return f"transformers {transformers.__version__}"


@torch.no_grad()
def compute(folder: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """(sequence, position, vocab) log-probabilities of what follows each token, and what is generated.

    Raises:
        ValueError: tensors are missing, so that numbers would be random.
    """
    loader = AutoModelForImageTextToText if has_towers(folder / "model") else AutoModelForCausalLM
    model, info = loader.from_pretrained(
        folder / "model", torch_dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    if lost := sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])}):
        raise ValueError(f"{len(lost)} tensors do not find their place, such as {lost[0]}")
    model.eval().generation_config.eos_token_id = None
    ids = torch.tensor(tokens)
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    logits = model(ids, use_cache=False).logits.double()
    return logits.log_softmax(-1).numpy(), generated[:, ids.shape[1] :].tolist()


@torch.no_grad()
def losses(model: Path, windows: list[list[int]]) -> list[float]:
    """Mean loss of each window, in nats per token."""
    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    return [float(loaded(ids, labels=ids).loss) for ids in torch.tensor(windows).unsqueeze(1)]
