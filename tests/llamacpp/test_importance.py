"""Importance matrices of a mixture, for the names that llama.cpp's converter gives, and what they are worth."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import llama_cpp
import numpy as np
import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.gguf_contents import read_contents
from moemerge.export.imatrix import Importance, read_importance
from moemerge.export.importance import importance_of
from moemerge.export.quantising import quantise
from tests.support.models import make_model, write_config
from tests.support.sentencepiece_model import VOCAB

ROOT = Path(__file__).parents[2]
REAL_MODELS = Path(os.environ.get("MOEMERGE_REAL_MODELS", ROOT / ".cache" / "models"))
TOPICS = [text for text in topics.values() if len(text) > 1500]
WINDOW = 256


# tests/llamacpp/child.py knows what tiny tokenizers need.
_CONVERT = "import sys, pathlib; from tests.llamacpp import child; child.convert(pathlib.Path(sys.argv[1]), ())"


def run(command: list[object]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("model_type", "moe", "shared"),
    [("llama", "mixtral", 0), ("granite", "granitemoeshared", 1), ("qwen3", "qwen3_moe", 0)],
)
def test_every_matrix_that_is_quantised_has_its_importance(tmp_path, tokenizer_folder, model_type, moe, shared):
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
    base, *experts = (make_model(tmp_path / str(seed), seed, model_type, **sizes) for seed in range(4 + shared))
    shutil.copytree(tokenizer_folder, base, dirs_exist_ok=True)
    keys = {"shared_experts": [{"source_model": str(experts.pop())}]} if shared else {}
    config = write_config(tmp_path / "c.yaml", base, experts, prompts=False, architecture=moe, **keys)
    merge(plan_merge(load_config(config)), tmp_path / "out")
    run([sys.executable, "-c", _CONVERT, tmp_path / "out"])
    model = read_contents(tmp_path / "out.gguf")
    (tmp_path / "a.txt").write_text(TOPICS[0])
    found = importance_of(tmp_path / "out", model.path, [str(tmp_path / "a.txt")], tokens=1024, device="cpu")
    assert found.tensors.keys() == {
        name
        for name, tensor in model.tensors.items()
        if name.startswith("blk.") and len(tensor.sizes) > 1 and "ffn_gate_inp" not in name
    }
    assert min(len(one.counts) for name, one in found.tensors.items() if "exps" in name) == 3
    report = quantise(model.path, tmp_path / "q.gguf", "iq4_nl", importance=found, threads=1)
    assert report.nbytes < report.source_bytes / 2
    # And as a file.
    found.write(tmp_path / "i.gguf")
    quantise(model.path, tmp_path / "r.gguf", "iq4_nl", importance=read_importance(tmp_path / "i.gguf"), threads=1)
    assert (tmp_path / "r.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Path, Path, Importance]:
    """SmolLM2-135M's mixture of four, in float16, and its importance matrix from every second topic of Python's help."""
    if not (REAL_MODELS / "base" / "config.json").exists():
        pytest.skip(f"no real models in {REAL_MODELS}")
    root = tmp_path_factory.mktemp("real")
    config = (ROOT / "configs" / "smollm2-4x135m.yaml").read_text().replace(".cache/models", str(REAL_MODELS))
    (root / "c.yaml").write_text(config)
    merge(plan_merge(load_config(root / "c.yaml")), root / "out")
    (root / "a.txt").write_text("\n<|document|>\n".join(TOPICS[::2]))
    model = root / "out.gguf"
    converter = Path(os.environ["LLAMACPP"], "convert_hf_to_gguf.py")
    run([sys.executable, converter, root / "out", "--outtype", "f16", "--outfile", model])
    return root, model, importance_of(root / "out", model, [str(root / "a.txt")], tokens=4096, device="cpu")


def predictions(model: Path, windows: list[list[int]]) -> np.ndarray:
    """(token, vocab) log-probabilities."""
    llama = llama_cpp.Llama(str(model), n_ctx=WINDOW, logits_all=True, verbose=False, n_threads=1)
    found = []
    for ids in windows:
        llama.reset()
        llama.eval(ids)
        logits = llama.scores[: len(ids)].copy()
        largest = logits.max(axis=-1, keepdims=True)
        found.append(logits - largest - np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)))
    llama.close()
    return np.concatenate(found)


def test_a_real_mixture_loses_little_and_less_with_an_importance_matrix(real):
    root, model, importance = real
    assert importance.uncovered() == {}
    llama = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    windows = [llama.tokenize(text.encode())[:WINDOW] for text in TOPICS[1:8:2]]
    llama.close()
    exact = predictions(model, windows)
    following = np.concatenate([[*ids[1:], 0] for ids in windows])
    counts = np.concatenate([[*[True] * (len(ids) - 1), False] for ids in windows])

    def measured(type_: str, told: Importance | None) -> tuple[float, float]:
        """How much the loss grows, and the divergence from the exact predictions, in nats a token."""
        quantise(model, root / "q.gguf", type_, importance=told, threads=1)
        found = predictions(root / "q.gguf", windows)
        grown = (exact - found)[np.arange(len(found)), following][counts].mean()
        return float(grown), float((np.exp(exact) * (exact - found)).sum(axis=-1).mean())

    loss, divergence = measured("q8_0", None)
    assert abs(loss) < 0.01
    assert divergence < 0.01
    plain, told = measured("q4_k_m", None), measured("q4_k_m", importance)
    assert abs(plain[0]) < 0.1
    assert divergence < told[1] < plain[1] < 0.1
    print(
        f"q8_0 {loss:+.4f} {divergence:.4f}; q4_k_m {plain[0]:+.4f} {plain[1]:.4f}; told {told[0]:+.4f} {told[1]:.4f}"
    )
