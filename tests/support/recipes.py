"""Recipes over tiny models, and text of each of them."""

import random
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.support.models import TEXT, make_model

WORDS = TEXT.replace("\n", " ").split()
# Eight recipes, which are all tried: without Optuna.
RECIPE: dict[str, Any] = {
    "base_model": "base",
    "gate_mode": ["ridge", "hidden"],
    "experts_per_token": [2, 1],
    "shared_weights": ["base", "average"],
    "router": {"tokens_per_expert": 100},
    "experts": [
        {"source_model": "code", "positive_texts": "code.txt"},
        {"source_model": "french", "positive_texts": "french.txt", "residual_scale": 0.8},
        {"source_model": "maths", "positive_texts": "maths.txt", "noise_scale": 0.01},
    ],
}
# Without end.
OPEN: dict[str, Any] = {
    **RECIPE,
    "shared_weights": ["base", "average", {"method": "ties", "density": [0.2, 0.5]}],
    "router": {"tokens_per_expert": 100, "scale": [1, {"log": [0.5, 4]}]},
    "experts": [*RECIPE["experts"][:2], {**RECIPE["experts"][2], "optional": True}],
}


def documents(seed: int, count: int = 12) -> str:
    """Texts of random words."""
    rng = random.Random(seed)
    return "\n<|document|>\n".join(" ".join(rng.choices(WORDS, k=25)) for _ in range(count))


def make_world(folder: Path) -> Path:
    """A base in bfloat16, three fine-tunes of it, and text for routers and to judge by."""
    for seed, name in enumerate(("base", "code", "french", "maths")):
        tuned_from = 0 if seed else None
        make_model(folder / name, seed, dtype=torch.bfloat16, num_hidden_layers=2, tuned_from=tuned_from)
        (folder / f"{name}.txt").write_text(documents(seed))
        (folder / f"{name}.test.txt").write_text(documents(10 + seed))
    return folder


def written(folder: Path, recipe: dict[str, Any] = RECIPE, **keys: Any) -> Path:
    """Write a recipe with other keys; returns its file."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **keys}, sort_keys=False))
    return folder / "recipe.yaml"


def data(world: Path) -> dict[str, list[str]]:
    """Text of two experts to judge by."""
    return {name: [str(world / f"{name}.test.txt")] for name in ("code", "french")}
