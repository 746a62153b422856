"""llama.cpp: its own converter, whose folder LLAMACPP names, then its engine, both in float32."""

import os
import sys
from pathlib import Path
from unittest import mock

import llama_cpp
import numpy as np

os.environ["GGML_NO_BACKTRACE"] = "1"  # which takes a debugger seconds
_SOURCE = Path(os.environ["LLAMACPP"])
sys.path[:0] = [str(_SOURCE), str(_SOURCE / "gguf-py")]

import conversion.base  # noqa: E402
import convert_hf_to_gguf  # noqa: E402
import torch._dynamo  # noqa: E402, F401  # stacking experts imports it, for a second
from transformers import AutoTokenizer  # noqa: E402, F401  # as the converter, late

_OPTIONS = {"qwen3_5_moe_text": ("--no-mtp",)}
"""Without which a family's converter stops: it looks for layers that predict further tokens."""


def version() -> str:
    """Name and version of the engine."""
    return f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"


def compute(folder: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """(sequence, position, vocab) log-probabilities of what follows each token, and what is generated."""
    gguf = folder / "model.gguf"
    try:
        _convert(folder / "model", gguf)
        return _compute(gguf, tokens, new_tokens)
    finally:
        gguf.unlink(missing_ok=True)


def _convert(model: Path, gguf: Path) -> None:
    """Run the converter; what it raises is raised, with the step's name.

    It knows byte-level tokenizers by a hash of what they make of a text, which no tiny one has: it is told that this
    one splits texts as Llama 3's does.
    """
    conversion.base.TextModel.get_vocab_base_pre = lambda *_: "llama-bpe"
    model_type = conversion.base.ModelBase.load_hparams(model, is_mistral_format=False)["model_type"]
    options = _OPTIONS.get(model_type, ())
    command = ["convert_hf_to_gguf.py", str(model), "--outtype", "f32", "--outfile", str(gguf), *options]
    try:
        with mock.patch.object(sys, "argv", command):
            convert_hf_to_gguf.main()
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"converter: {type(error).__name__}: {error}") from error


def _compute(gguf: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    # Keys and values are kept in float32 too: in float16, the default, logits differ by 0.7 %.
    llama = llama_cpp.Llama(
        str(gguf), n_ctx=128, logits_all=True, n_threads=1, n_threads_batch=1,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    found, generated = [], []
    for sequence in tokens:
        llama.reset()
        llama.eval(sequence)
        logits = llama.scores[: len(sequence)].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        found.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
        new: list[int] = []
        for _ in range(new_tokens):
            new.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval([new[-1]])
        generated.append(new)
    return np.stack(found), generated


def losses(model: Path, windows: list[list[int]]) -> list[float]:
    """Mean loss of each window of a GGUF file, in nats per token."""
    llama = llama_cpp.Llama(str(model), n_ctx=len(windows[0]), logits_all=True, n_batch=len(windows[0]), verbose=False)
    found = []
    for ids in windows:
        llama.reset()
        llama.eval(ids)
        logits = llama.scores[: len(ids) - 1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        found.append(-float(logprobs[np.arange(len(ids) - 1), ids[1:]].mean()))
    return found
