"""A base model loaded as a whole reads the prompts of a config: what moemerge's pass is compared with.

    python benchmarks/whole_model_pass.py CONFIG --dtype float32

The same prompts in the same batches as moemerge's: sorted by length, at most 1024 padded tokens, padding on the right.
The head is run on one position of each prompt only. Prints seconds of loading and of running, and the tokens, as JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS_PER_BATCH = 1024


def batches(prompts: list[list[int]]) -> Iterator[torch.Tensor]:
    group: list[list[int]] = []
    for ids in [*sorted(prompts, key=len), None]:
        if group and (ids is None or (len(group) + 1) * len(ids) > TOKENS_PER_BATCH):
            yield torch.tensor([prompt + [0] * (len(group[-1]) - len(prompt)) for prompt in group])
            group = []
        if ids is not None:
            group.append(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    tokenizer = AutoTokenizer.from_pretrained(config["base_model"])
    prompts = [tokenizer(text)["input_ids"] for expert in config["experts"] for text in expert["positive_prompts"]]

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(config["base_model"], dtype=getattr(torch, options.dtype)).eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        for ids in batches(prompts):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    ran = time.perf_counter()
    tokens = sum(map(len, prompts))
    print(json.dumps({"load_seconds": loaded - start, "run_seconds": ran - loaded, "tokens": tokens}))


if __name__ == "__main__":
    main()
