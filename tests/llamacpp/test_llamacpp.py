"""llama.cpp reads merged models: its own converter takes them, and it computes what transformers computes.

Run by `make test-llamacpp`, which compiles llama.cpp and names the folder of its source in LLAMACPP.
"""

import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moemerge import load_config, merge, plan_merge
from tests.models import load, make_model, write_config

EXPERTS = ("fox", "code", "chat")
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
TEXTS = (
    "The return value of a function is a list of names, sorted by their length.",
    "def main(argv):\n    return {item: 1 for item in argv}",
    "Ein Käse für 3 €, bitte!  日本",
)
NEW_TOKENS = 16
# What differs is the order of float32 sums: 1e-5 of the largest logit, as between two attention kernels of torch.
# transformers 5.23 and llama.cpp of 0.3.36 were XXX apart.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A base model, and what its settings have to become in GGUF."""

    model_type: str
    sizes: dict[str, Any]
    rope: dict[str, Any]
    """GGUF fields about rotary embeddings, without the leading `llama.rope.`."""
    dtype: torch.dtype = torch.float32
    files: int = 1
    notes: list[str] = field(default_factory=list)


LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}
YARN_FIELDS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128}
CASES = {
    "llama, llama3 rope": Case("llama", LLAMA3, {"freq_base": 10000.0, "dimension_count": 16}),
    "llama, llama3 rope, tied": Case(
        "llama", {**LLAMA3, "tie_word_embeddings": True}, {"freq_base": 10000.0, "dimension_count": 16}
    ),
    "llama, yarn": Case("llama", YARN, {"freq_base": 10000.0, "dimension_count": 16, **YARN_FIELDS}),
    "mistral, bfloat16": Case(
        "mistral",
        {"head_dim": 32, "rope_theta": 1000000.0, "sliding_window": None},
        {"freq_base": 1000000.0, "dimension_count": 32},
        torch.bfloat16,
    ),
    "mistral, tied": Case(
        "mistral", {"tie_word_embeddings": True, "sliding_window": 4096}, {"freq_base": 10000.0, "dimension_count": 16}
    ),
}


@dataclass(frozen=True)
class Converted:
    """A merged model, its sources, and what the converter made of it."""

    case: Case
    base: Path
    experts: list[Path]
    merged: Path
    gguf: Path

    @property
    def reader(self) -> gguf.GGUFReader:
        return gguf.GGUFReader(self.gguf)


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A small vocabulary with the whole byte fallback; the text comes with Python."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for topic in topics.values() for line in topic.splitlines() if line),
        model_writer=written, vocab_size=512, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture(scope="module", params=CASES)
def converted(request, tmp_path_factory, sentencepiece_model) -> Converted:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp("llamacpp")
    base, *experts = (
        make_model(root / name, seed, case.model_type, case.dtype, **SIZES, **case.sizes)
        for seed, name in enumerate(("base", *EXPERTS))
    )
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(sentencepiece_model)
    (base / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        })
    )  # fmt: skip
    merged = root / "merged"
    plan = plan_merge(load_config(write_config(root / "merge.yaml", base, experts)), max_shard_bytes=400_000)
    assert len(plan.shards) > 1
    merge(plan, merged)
    converter = Path(os.environ["LLAMACPP"], "convert_hf_to_gguf.py")
    outfile = root / "merged.gguf"
    done = subprocess.run(
        [sys.executable, converter, merged, "--outtype", "f32", "--outfile", outfile],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return Converted(case, base, experts, merged, outfile)


def test_x(converted):
    r = converted.reader
    for f in r.fields.values():
        if not f.name.startswith("tokenizer"): print(f.name, f.contents())
    for t in r.tensors: print(t.name, t.shape, t.tensor_type)
    print(sorted(p.name for p in converted.merged.iterdir()))
    llm = llama_cpp.Llama(str(converted.gguf), n_ctx=128, logits_all=True, type_k=0, type_v=0, verbose=False)
    model = load(converted.merged)
    tok = AutoTokenizer.from_pretrained(converted.merged)
    for text in TEXTS:
        ids = tok(text).input_ids
        assert llm.tokenize(text.encode()) == ids
        llm.reset()
        found = list(itertools.islice(llm.generate(ids, temp=0.0), NEW_TOKENS))
        with torch.no_grad():
            want = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16, eos_token_id=None)[0].tolist()
            print(found, want[len(ids):])
            lo = model(torch.tensor([want[:-1]])).logits[0].numpy()
        n=len(want)-1
        assert llm.n_tokens == n
        d=np.abs(llm.scores[:n]-lo)
        top=np.sort(lo,axis=1)
        gap=(top[:,-1]-top[:,-2])[len(ids)-1:].min()
        print("DIFF", d.max(), d[len(ids)-1].max(), np.abs(lo).max(), lo.std(), "gap", gap, len(ids))
        assert found == want[len(ids):]
