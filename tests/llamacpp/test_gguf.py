"""GGUF files that moemerge writes: the bytes of llama.cpp's converter, its keys, and transformers' tokens."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.export.writing import write_gguf
from tests.llamacpp.engine import converted
from tests.models import make_model, write_config

TYPES = ("f32", "f16", "bf16", "q8_0")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}
KINDS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "mixtral": ("mixtral", "llama", {}, False),
    "mixtral, tied, llama3 rope": ("mixtral", "llama", LLAMA3 | {"tie_word_embeddings": True}, False),
    "mixtral, yarn": ("mixtral", "llama", YARN, False),
    "mixtral, head_dim, window": ("mixtral", "mistral", {"head_dim": 32, "sliding_window": 64}, False),
    "mixtral, appended shared": ("mixtral", "llama", {}, True),
    "granitemoe": ("granitemoe", "granite", {}, False),
    "granitemoe, biases": ("granitemoe", "llama", {"attention_bias": True}, False),
    "granitemoeshared": ("granitemoeshared", "granite", {}, True),
    "qwen3_moe": ("qwen3_moe", "qwen3", {"head_dim": 16}, False),
    "qwen3_moe, tied": ("qwen3_moe", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, False),
}
# What tells a file of one program from one of another.
ASIDE: set[str] = set()


def read(file: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, tuple[int, ...], bytes]]]:
    """Keys with their values, and tensors: type, shape, bytes."""
    reader = gguf.GGUFReader(file)
    return (
        {name: field.contents() for name, field in reader.fields.items() if name not in ASIDE},
        {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader.tensors},
    )  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A mixture of a kind, made once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            moe, model_type, sizes, shared = KINDS[name]
            root = tmp_path_factory.mktemp("gguf")
            base, *experts = (
                make_model(root / str(seed), seed, model_type, **SIZES | sizes) for seed in range(3 + shared)
            )
            keys = {"shared_experts": [{"source_model": str(experts.pop())}]} if shared else {}
            config = write_config(root / "merge.yaml", base, experts, prompts=False, architecture=moe, **keys)
            merge(plan_merge(load_config(config)), root / "out")
            made[name] = root / "out"
        return made[name]

    return of


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", KINDS)
def test_files_are_those_of_the_converter(merged, name, kind):
    out = merged(name)
    theirs = converted(out, kind, "gpt-2")
    assert isinstance(theirs, Path), theirs
    ours = out.with_name("ours.gguf")
    write_gguf(out, ours, type=kind, overwrite=True)
    keys, tensors = read(ours)
    expected_keys, expected_tensors = read(theirs)
    assert keys == expected_keys
    assert tensors.keys() == expected_tensors.keys()
    for tensor, expected in expected_tensors.items():
        assert tensors[tensor] == expected, tensor
