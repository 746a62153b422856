"""llama.cpp with the file that `moemerge gguf` writes."""

from pathlib import Path

import llama_cpp
import numpy as np
from converter_engine import compute_file, version
from logprobs import logprobs_of
from writers import MADE_BY

from moemerge.errors import RefusedError
from moemerge.export.writing import GgufOptions, write_gguf

__all__ = ["MADE_BY", "compute", "losses", "version"]


def compute(folder: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """(sequence, position, vocab) log-probabilities of what follows each token, and what is generated.

    Raises:
        RuntimeError: the mixture, or its family, is not written.
    """
    model, gguf = folder / "model", folder / "ours.gguf"
    try:
        write_gguf(model, gguf, GgufOptions(type="f32", overwrite=True))
        return compute_file(gguf, tokens, new_tokens)
    except RefusedError as error:
        raise RuntimeError(str(error).split(": ", 1)[-1]) from error  # without the family's name
    finally:
        gguf.unlink(missing_ok=True)


def losses(model: Path, windows: list[list[int]]) -> list[float]:
    """Mean loss of each window of a GGUF file, in nats per token."""
    llama = llama_cpp.Llama(str(model), n_ctx=len(windows[0]), logits_all=True, n_batch=len(windows[0]), verbose=False)
    found = []
    for ids in windows:
        llama.reset()
        llama.eval(ids)
        logprobs = logprobs_of(llama.scores[: len(ids) - 1])
        found.append(-float(logprobs[np.arange(len(ids) - 1), ids[1:]].mean()))
    return found
