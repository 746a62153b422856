"""How fast GGUF files decode in llama.cpp, one token at a time: tokens per second, and times as ratios to the first.

    .venv-llamacpp/bin/python benchmarks/decode_speed.py top2.gguf top1.gguf base.gguf --text french.test.txt

The virtual environment is that of `make test-llamacpp`. Each file reads the same text a token at a time, as a model
that writes does. The files take turns, so that other programs disturb all alike; processor time counts, and a ratio is
the median of those of the rounds, with the least and the largest.
"""

import argparse
import platform
import time
from pathlib import Path
from statistics import median

import llama_cpp

START = 32  # tokens that are read at once before the clock runs


def seconds(model: llama_cpp.Llama, ids: list[int]) -> float:
    """Processor time of decoding all tokens but the first ones, one at a time."""
    model.reset()
    model.eval(ids[:START])
    start = time.process_time()
    for token in ids[START:]:
        model.eval([token])
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    models = {
        path.name: llama_cpp.Llama(
            str(path), n_ctx=START + options.tokens, n_threads=options.threads, n_batch=START, verbose=False
        )
        for path in options.files
    }
    print(f"llama-cpp-python {llama_cpp.__version__}, {platform.machine()}, {options.threads} thread(s)")
    text = options.text.read_text(encoding="utf-8")
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.repeat + 1):
        for name, model in models.items():
            ids = model.tokenize(text.encode(), add_bos=False)[: START + options.tokens]
            of_round = seconds(model, ids)
            if turn:  # the first round brings the files into memory
                found[name].append(of_round)
    first = next(iter(found.values()))
    for name, taken in found.items():
        ratios = [mine / its for mine, its in zip(taken, first, strict=True)]
        speed = f"{options.tokens / median(taken):6.1f} tokens/s"
        print(f"{name:24} {speed}, time x {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
