"""The configs that are shipped: each is planned, over tiny models in the places that it names; real ones are merged."""

import os
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checks.inspection import inspect_checkpoint
from tests.support.models import load, make_model, tokenizer

ROOT = Path(__file__).parents[2]
KINDS = {"qwen2": "qwen2", "qwen3": "qwen3", "mistral": "mistral", "7b": "mistral"}
FAMILIES = {
    "chat-qwen2.5-2x1.5b.yaml": "granitemoehybrid",
    "residual-qwen2.5-3x1.5b.yaml": "granitemoehybrid",
    "second-half-qwen3-2x4b.yaml": "qwen3_moe",
}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# SmolLM2-135M-Instruct and four fine-tunes of it, 1.4 GB: see configs/smollm2-4x135m.yaml.
REAL_MODELS = Path(os.environ.get("MOEMERGE_REAL_MODELS", ROOT / ".cache" / "models"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_can_be_planned(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    config = load_config(path, allow_identical_experts="upcycle" in path.name)
    model_type = next((kind for name, kind in KINDS.items() if name in path.name), "llama")
    references = {config.base_model, *(expert.source_model for expert in [*config.experts, *config.shared_experts])}
    for seed, reference in enumerate(sorted(references)):
        folder = make_model(tmp_path / reference, seed, model_type, tie_word_embeddings=True)
        if path.name.startswith("chat"):
            (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    plan = plan_merge(config)
    assert plan.family.model_type == FAMILIES.get(path.name, "mixtral")
    assert {output.shape[0] for name, output in plan.outputs.items() if name.endswith(plan.family.router)} == {
        len(config.experts)
    }


@pytest.mark.skipif(not (REAL_MODELS / "base" / "config.json").exists(), reason=f"no real models in {REAL_MODELS}")
@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random", "uniform_random"])
def test_real_models_merge_and_speak(tmp_path, monkeypatch, mode):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "models").symlink_to(REAL_MODELS)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "smollm2-4x135m.yaml").read_text().replace("gate_mode: hidden", f"gate_mode: {mode}")
    (tmp_path / "c.yaml").write_text(text)
    report = merge(plan_merge(load_config(tmp_path / "c.yaml")), tmp_path / "out")
    assert inspect_checkpoint(str(tmp_path / "out")).experts == 4
    if mode == "hidden":
        assert min(report.hit_rate) > 0.8
        assert report.warnings() == []
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = words("The capital of France is", return_tensors="pt")
    told = words.decode(load(tmp_path / "out").generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in told


def test_the_tokenizer_of_the_tests_puts_a_bos_token_in_front():
    assert tokenizer()("fox")["input_ids"][0] == tokenizer().bos_token_id
