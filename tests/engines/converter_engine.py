"""llama.cpp's own converter, whose folder LLAMACPP names, then its engine, both in float32."""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from logprobs import logprobs_of

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.llamacpp import child

_OPTIONS = dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), ("--no-mtp",))
"""Without which a family's converter stops: it looks for layers that predict further tokens."""


def version() -> str:
    """Name and version of the engine."""
    return f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"


def compute(folder: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """(sequence, position, vocab) log-probabilities of what follows each token, and what is generated."""
    gguf = folder / "model.gguf"
    try:
        convert(folder / "model")
        return compute_file(gguf, tokens, new_tokens)
    finally:
        gguf.unlink(missing_ok=True)


def convert(model: Path) -> None:
    """Write the file beside the model; what the converter raises is raised, with the step's name.

    Raises:
        RuntimeError: the converter takes no such model.
    """
    model_type = json.loads((model / "config.json").read_text())["model_type"]
    try:
        child.convert(model, _OPTIONS.get(model_type, ()))
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"converter: {type(error).__name__}: {error}") from error


def compute_file(gguf: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """What `compute` gives, of a GGUF file."""
    llama = child.opened(gguf)
    found, generated = [], []
    for sequence in tokens:
        llama.reset()
        llama.eval(sequence)
        found.append(logprobs_of(llama.scores[: len(sequence)]))
        new: list[int] = []
        for _ in range(new_tokens):
            new.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval([new[-1]])
        generated.append(new)
    return np.stack(found), generated
