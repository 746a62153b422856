"""vLLM on the CPU, in float32."""

import os
from pathlib import Path

import numpy as np

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
import vllm
from towers import has_towers


def version() -> str:
    """Name and version of the engine."""
    return f"vllm-cpu {vllm.__version__}"


def compute(folder: Path, tokens: list[list[int]], new_tokens: int) -> tuple[np.ndarray, list[list[int]]]:
    """(sequence, position, vocab) log-probabilities of what follows each token but the last, and what is generated."""
    without_images = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if has_towers(folder / "model") else {}
    engine = vllm.LLM(
        str(folder / "model"), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, max_logprobs=-1,
        skip_tokenizer_init=True, enable_prefix_caching=False, seed=0, disable_log_stats=True, **without_images,
    )  # fmt: skip
    settings = vllm.SamplingParams(
        max_tokens=new_tokens, temperature=0, ignore_eos=True, prompt_logprobs=-1, detokenize=False
    )
    answers = engine.generate([{"prompt_token_ids": ids} for ids in tokens], settings, use_tqdm=False)
    logprobs = [
        [[place[token].logprob for token in range(len(place))] for place in answer.prompt_logprobs[1:]]
        for answer in answers
    ]
    return np.array(logprobs), [list(answer.outputs[0].token_ids) for answer in answers]


def losses(model: Path, windows: list[list[int]]) -> list[float]:
    """Mean loss of each window, in nats per token."""
    engine = vllm.LLM(
        str(model), dtype="float32", enforce_eager=True, max_model_len=len(windows[0]) + 1, max_num_seqs=1,
        skip_tokenizer_init=True, enable_prefix_caching=False, seed=0, disable_log_stats=True,
    )  # fmt: skip
    settings = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in windows], settings, use_tqdm=False)
    return [
        -sum(place[token].logprob for token, place in zip(ids[1:], answer.prompt_logprobs[1:], strict=True))
        / (len(ids) - 1)
        for ids, answer in zip(windows, answers, strict=True)
    ]
