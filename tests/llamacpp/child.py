"""What runs beside the tests: llama.cpp's converter and its engine, in a process of its own for every model.

The converter brings a gguf package of its own and keeps settings in its classes; the engine ends a process by abort.
Importing this module imports the converter.
"""

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


def convert(folder: Path, options: tuple[str, ...], pre: str = "llama-bpe") -> Path:
    """Run the converter; what it raises is raised.

    It knows byte-level tokenizers by a hash of what they make of a text, which no tiny one has: it is told how this
    one splits texts, as Llama 3's does unless said otherwise.
    """
    out = folder.with_suffix(".gguf")
    conversion.base.TextModel.get_vocab_base_pre = lambda *_: pre
    command = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(out), *options]
    with mock.patch.object(sys, "argv", command):
        convert_hf_to_gguf.main()
    return out


def opened(gguf: Path) -> llama_cpp.Llama:
    """The engine, in float32: with keys and values in float16, the default, logits differ by 0.7 %."""
    return llama_cpp.Llama(
        str(gguf),
        n_ctx=128,
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )


def compute(gguf: Path, tokens: list[list[int]]) -> np.ndarray:
    """(sequence, position, vocab) logits."""
    llama = opened(gguf)
    found = []
    for sequence in tokens:
        llama.reset()
        llama.eval(sequence)
        found.append(llama.scores[: len(sequence)].copy())
    return np.stack(found)


def encode(gguf: Path, texts: list[str]) -> list[list[int]]:
    """The tokens of texts, by the vocabulary alone."""
    llama = llama_cpp.Llama(str(gguf), vocab_only=True)
    return [llama.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
