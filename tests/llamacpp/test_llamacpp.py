"""llama.cpp reads merged models: its own converter takes them, and it computes what transformers computes.

`make test-llamacpp` runs this: it compiles llama.cpp, and names the folder of its source in LLAMACPP.
"""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moemerge import load_config, merge, plan_merge
from moemerge.planning.options import PlanOptions
from tests.support.models import load, make_model, write_config
from tests.support.sentencepiece_model import VOCAB

LAYERS, NEW_TOKENS = 3, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
TEXTS = (
    "The return value of a function is a list of names, sorted by their length.",
    "def main(argv):\n    return {item: 1 for item in argv}",
    "Ein Käse für 3 €, bitte!  日本",
)
# Of the largest logit. Both programs round float32 sums, each in its own order: here their logits are up to 1.3e-5
# apart, and each is as far from float64. Over 170 other prompts it was 7e-5. Faults make more: 1.2e-3 where one entry
# of one norm weight is 1 % too large, 0.2 and more where experts, router rows or rope settings are mixed up.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A base model, and what its rotary settings have to become."""

    model_type: str
    sizes: dict[str, Any]
    rope: dict[str, Any]
    """All GGUF fields that begin with `llama.rope.`."""
    dtype: torch.dtype = torch.float32


LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}
YARN_FIELDS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128}
PLAIN_FIELDS = {"freq_base": 10000.0, "dimension_count": 16}
CASES = {
    "llama, llama3 rope": Case("llama", LLAMA3, PLAIN_FIELDS),
    "llama, llama3 rope, tied": Case("llama", LLAMA3 | {"tie_word_embeddings": True}, PLAIN_FIELDS),
    "llama, yarn": Case("llama", YARN, PLAIN_FIELDS | YARN_FIELDS),
    "mistral, wide heads, bfloat16": Case(
        "mistral",
        {"head_dim": 32, "rope_theta": 1000000.0, "sliding_window": None},
        {"freq_base": 1000000.0, "dimension_count": 32},
        torch.bfloat16,
    ),
    "mistral, tied": Case("mistral", {"tie_word_embeddings": True, "sliding_window": 4096}, PLAIN_FIELDS),
}


@dataclass(frozen=True)
class Converted:
    """A merged model, its sources, and the GGUF file that the converter made of it."""

    case: Case
    base: Path
    experts: list[Path]
    merged: Path
    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    llama: llama_cpp.Llama


@pytest.fixture(scope="module", params=CASES)
def converted(request, tmp_path_factory, tokenizer_folder):
    case = CASES[request.param]
    root = tmp_path_factory.mktemp("llamacpp")
    base, *experts = (
        make_model(root / name, seed, case.model_type, case.dtype, **SIZES | case.sizes)
        for seed, name in enumerate(("base", "fox", "code", "chat"))
    )
    shutil.copytree(tokenizer_folder, base, dirs_exist_ok=True)
    plan = plan_merge(
        load_config(write_config(root / "merge.yaml", base, experts, architecture="mixtral")),
        PlanOptions(max_shard_bytes=400_000),
    )
    assert len(plan.shards) > 1
    merge(plan, root / "merged")

    converter = Path(os.environ["LLAMACPP"], "convert_hf_to_gguf.py")
    command = [sys.executable, converter, root / "merged", "--outtype", "f32", "--outfile", root / "merged.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    reader = gguf.GGUFReader(root / "merged.gguf")
    # Keys and values are kept in float32 too: in float16, the default, logits differ by 0.7 % and routers may choose
    # another expert.
    llama = llama_cpp.Llama(
        str(root / "merged.gguf"),
        n_ctx=128,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    yield Converted(
        case,
        base,
        experts,
        root / "merged",
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor.data for tensor in reader.tensors},
        llama,
    )
    llama.close()


def test_the_model_is_described_in_full(converted):
    sizes = converted.case.sizes
    expected = {
        "general.architecture": "llama",
        "llama.expert_count": 3,
        "llama.expert_used_count": 2,
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": VOCAB,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": sizes.get("head_dim", 16),
        "llama.attention.value_length": sizes.get("head_dim", 16),
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        **{f"llama.rope.{name}": value for name, value in converted.case.rope.items()},
    }
    found = {name: value for name, value in converted.fields.items() if name in expected or ".rope." in name}
    assert found == expected


def test_every_tensor_is_there_and_no_other(converted):
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate_inp", "ffn_gate_exps",
             "ffn_up_exps", "ffn_down_exps")  # fmt: skip
    expected = {f"blk.{layer}.{part}.weight" for layer in range(LAYERS) for part in parts}
    expected |= {"token_embd.weight", "output_norm.weight"}
    if "tie_word_embeddings" not in converted.case.sizes:
        expected.add("output.weight")
    if converted.case.sizes.get("rope_scaling") == LLAMA3["rope_scaling"]:
        expected.add("rope_freqs.weight")
    assert set(converted.tensors) == expected


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_stacked_experts_are_the_sources_ffns(converted, role):
    sources = [load_file(expert / "model.safetensors") for expert in converted.experts]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.{role}_proj.weight"
        expected = torch.stack([source[name].float() for source in sources]).numpy()  # (expert, out, in)
        found = converted.tensors[f"blk.{layer}.ffn_{role}_exps.weight"]
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()


def test_shared_tensors_are_the_bases(converted):
    # Rows of attn_q and attn_k are reordered by the converter; what the model computes shows that they are right.
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        **{
            f"model.layers.{layer}.{part}": f"blk.{layer}.{stored}"
            for layer in range(LAYERS)
            for part, stored in {
                "input_layernorm": "attn_norm",
                "self_attn.v_proj": "attn_v",
                "self_attn.o_proj": "attn_output",
                "post_attention_layernorm": "ffn_norm",
            }.items()
        },
    }
    if "tie_word_embeddings" in converted.case.sizes:
        del names["lm_head"]
    base = load_file(converted.base / "model.safetensors")
    for name, stored in names.items():
        expected = base[f"{name}.weight"].float().numpy()
        assert converted.tensors[f"{stored}.weight"].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("converted", [name for name in CASES if "llama3 rope" in name], indirect=True)
def test_llama3_rope_has_the_factors_of_transformers(converted):
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(converted.base), torch.device("cpu"))
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = plain / scaled
    assert factors.min() == 1
    assert factors.max() == 8
    np.testing.assert_allclose(converted.tensors["rope_freqs.weight"], factors.numpy(), rtol=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_text_becomes_the_same_tokens(converted, text):
    expected = AutoTokenizer.from_pretrained(converted.merged)(text).input_ids
    assert expected[0] == 1
    assert converted.llama.tokenize(text.encode()) == expected


@torch.no_grad()
def test_both_generate_the_same_tokens_from_the_same_logits(converted):
    model = load(converted.merged)
    for text in TEXTS:
        prompt = AutoTokenizer.from_pretrained(converted.merged)(text).input_ids
        generated = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
        converted.llama.reset()
        found = list(itertools.islice(converted.llama.generate(prompt, temp=0.0), NEW_TOKENS))
        assert prompt + found == generated[0].tolist()

        expected = model(generated[:, :-1]).logits[0].numpy()  # (position, vocab)
        assert converted.llama.n_tokens == len(expected)
        difference = np.abs(converted.llama.scores[: len(expected)] - expected).max()
        assert difference <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("converted", [name for name in CASES if name.startswith("llama, ")], indirect=True)
@torch.no_grad()
def test_rope_scaling_matters_where_it_is_tested(converted):
    prompt = AutoTokenizer.from_pretrained(converted.merged)(TEXTS[0]).input_ids
    model = load(converted.merged, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    converted.llama.reset()
    converted.llama.eval(prompt)
    unscaled = model(torch.tensor([prompt])).logits[0].numpy()
    assert np.abs(converted.llama.scores[: len(prompt)] - unscaled).max() > 0.1 * np.abs(unscaled).max()
