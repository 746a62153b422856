"""What the page says that well-known models become is what plans of such models say."""

import pytest

from moemerge import load_config, plan_merge
from moemerge.errors import IncompatibleError
from moemerge.families.known_models import Becomes, known_models
from tests.support.models import make_model, write_config

ROWS = {row.name: row for row in known_models()}
TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("name", "model_type", "sizes"),
    [
        ("Llama 2, TinyLlama, Yi 1.5, Falcon 3", "llama", {}),
        ("Mistral 7B v0.1, Zephyr", "mistral", {"sliding_window": 8}),
        ("Qwen2.5 0.5B to 3B", "qwen2", TIED),
        ("Qwen3 0.6B, 4B", "qwen3", TIED | {"head_dim": 16}),
        ("Gemma 2B", "gemma", TIED | {"head_dim": 8}),
        ("GLM-4-9B, the -hf checkpoints", "glm", {"head_dim": 8}),
    ],
)
def test_plans_say_what_the_table_says(tmp_path, name, model_type, sizes):
    base, expert = (make_model(tmp_path / str(seed), seed, model_type, **sizes) for seed in range(2))
    shared = {"shared_experts": [{"source_model": str(expert)}]}
    for told, keys in {"plain": {}, "shared": shared, "upper": {"moe_layers": "second-half"}}.items():
        config = write_config(tmp_path / "merge.yaml", base, [expert, base], prompts=False, **keys)
        try:
            choice = plan_merge(load_config(config)).shape.choice
            found = Becomes(choice.family.model_type, choice.right_in, choice.untried)
        except IncompatibleError:
            found = Becomes("")
        assert found == getattr(ROWS[name], told)
