"""OpenVINO by optimum-intel, in float32."""

from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import torch
from optimum.intel import OVModelForCausalLM, OVModelForVisualCausalLM
from towers import has_towers


def version() -> str:
    """Name and version of the engine, and of what exports to it."""
    return f"openvino {installed('openvino')}, optimum-intel {installed('optimum-intel')}"


def _open(model: Path) -> OVModelForCausalLM | OVModelForVisualCausalLM:
    loader = OVModelForVisualCausalLM if has_towers(model) else OVModelForCausalLM
    return loader.from_pretrained(
        model,
        export=True,
        compile=True,
        load_in_8bit=False,
        ov_config={
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        },
    )


def compute(folder: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """(sequence, position, vocab) log-probabilities of what follows each token, and what is generated."""
    model = _open(folder / "model")
    model.generation_config.eos_token_id = None
    found, generated = [], []
    for sequence in tokens:
        ids = torch.tensor([sequence])
        mask = torch.ones_like(ids)
        found.append(model(input_ids=ids, attention_mask=mask).logits[0].double().log_softmax(-1).numpy())
        new = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
        generated.append(new[0, ids.shape[1] :].tolist())
    return np.stack(found), generated


def losses(model: Path, windows: list[list[int]]) -> list[float]:
    """Mean loss of each window, in nats per token."""
    loaded = _open(model)
    found = []
    for sequence in windows:
        ids = torch.tensor([sequence])
        logits = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].double()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return found
