"""mlx-lm on the CPU, in float32."""

from importlib.metadata import version as installed
from pathlib import Path

import mlx.core as mx
import numpy as np
from logprobs import logprobs_of
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def version() -> str:
    """Name and version of the engine."""
    return f"mlx-lm {installed('mlx-lm')}"


def compute(folder: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """(sequence, position, vocab) log-probabilities of what follows each token, and what is generated."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder / "model")
    found, generated = [], []
    for ids in tokens:
        found.append(logprobs_of(np.array(model(mx.array([ids]))[0].astype(mx.float32))))
        cache, given, new = make_prompt_cache(model), mx.array([ids]), []
        for _ in range(new_tokens):
            new.append(int(mx.argmax(model(given, cache=cache)[0, -1]).item()))
            given = mx.array([[new[-1]]])
        generated.append(new)
    return np.stack(found), generated


def losses(model: Path, windows: list[list[int]]) -> list[float]:
    """Mean loss of each window, in nats per token."""
    mx.set_default_device(mx.cpu)
    loaded, _ = load_model(model)
    loaded.set_dtype(mx.float32)
    found = []
    for ids in windows:
        logits = loaded(mx.array([ids[:-1]]))[0]
        chosen = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
        found.append(float((mx.logsumexp(logits, axis=-1) - chosen).mean().item()))
    return found
