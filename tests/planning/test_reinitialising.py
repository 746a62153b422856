"""Drop-upcycling: a share of an expert's neurons drawn anew, in merges and edits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.checks.verification import verify_merge
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.config.yaml_text import write_yaml
from moemerge.editing.planner import plan_edit
from moemerge.editing.writing import write_edit
from moemerge.errors import ConfigError
from moemerge.planning.fingerprint import plan_fingerprint
from tests.support.models import SIZES, load_weights, make_model

WIDTH, LAYERS = SIZES["intermediate_size"], SIZES["num_hidden_layers"]
MIXTRAL = ("w1", "w3", "w2")


def upcycled(model: Path, *experts: dict[str, Any]) -> MergeConfig:
    document = {"base_model": str(model), "experts": [{"source_model": str(model), **expert} for expert in experts]}
    return load_config({**document, "gate_mode": "random"}, allow_identical_experts=True)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_weights(folder).items()}


def projections(tensors: dict[str, np.ndarray], prefix: str, names: tuple[str, str, str]) -> list[np.ndarray]:
    """Gate, up and down (neuron, hidden) of an FFN."""
    gate, up, down = (tensors[f"{prefix}.{name}.weight"] for name in names)
    return [gate, up, down.T]


def drawn_anew(out: Path, model: Path, expert: int, layer: int) -> np.ndarray:
    """Which neurons of an expert are not the model's (neuron,); they are the same in all projections."""
    made, source = weights(out), weights(model)
    ours = projections(made, f"model.layers.{layer}.block_sparse_moe.experts.{expert}", MIXTRAL)
    theirs = projections(source, f"model.layers.{layer}.mlp", ("gate_proj", "up_proj", "down_proj"))
    changed = [a != b for a, b in zip(ours, theirs, strict=True)]
    rows: np.ndarray = changed[0].any(axis=1)
    for one in changed:
        assert (one.any(axis=1) == rows).all()
        assert (~one[rows]).sum() < 0.01 * one.size
    return rows


def test_a_share_of_neurons_is_drawn_anew_in_all_three_projections(tmp_path):
    model = make_model(tmp_path / "model")
    plan = plan_merge(upcycled(model, {"reinit": 0.5}, {"reinit": {"share": 0.3, "seed": 0}}, {}))
    merge(plan, tmp_path / "out")
    chosen = [[drawn_anew(tmp_path / "out", model, expert, layer) for layer in range(LAYERS)] for expert in range(3)]
    assert [[rows.sum() for rows in layers] for layers in chosen] == [
        [int(share * WIDTH)] * LAYERS for share in (0.5, 0.3, 0)
    ]
    first, second = chosen[0], chosen[1]
    assert (first[0] != first[1]).any()
    assert any((one & ~other).any() for one, other in zip(second, first, strict=True))
    verified = verify_merge(plan, tmp_path / "out")
    assert not verified.differences
    assert verified.converted == 2 * 3 * LAYERS


def test_what_is_drawn_has_the_mean_and_deviation_of_what_it_replaces(tmp_path):
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    merge(plan_merge(upcycled(model, {"reinit": 0.5}, {})), tmp_path / "out")
    rows = drawn_anew(tmp_path / "out", model, 0, 0)
    ours = projections(weights(tmp_path / "out"), "model.layers.0.block_sparse_moe.experts.0", MIXTRAL)
    theirs = projections(weights(model), "model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj"))
    for made, source in zip(ours, theirs, strict=True):
        error = source[rows].std() / rows.sum() ** 0.5 / made.shape[1] ** 0.5
        assert abs(made[rows].mean() - source[rows].mean()) < 5 * error
        assert abs(made[rows].std() - source[rows].std()) < 5 * error
        assert abs(np.corrcoef(made[rows].ravel(), source[rows].ravel())[0, 1]) < 0.02


def test_equal_seeds_give_equal_bytes_and_another_seed_is_seen_by_verify_and_resume(tmp_path):
    model = make_model(tmp_path / "model")
    plan = plan_merge(upcycled(model, {"reinit": 0.5}, {}))
    merge(plan, tmp_path / "out")
    merge(plan_merge(upcycled(model, {"reinit": 0.5}, {})), tmp_path / "again")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert all(shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes() for shard in shards)
    assert shards
    other = plan_merge(upcycled(model, {"reinit": {"share": 0.5, "seed": 1}}, {}))
    found = {difference.what for difference in verify_merge(other, tmp_path / "out").differences}
    drawn = (f"experts.0.{name}.weight" for name in MIXTRAL)
    assert found == {"moemerge_config.yaml: experts[0].reinit.seed"} | {
        f"model.layers.{layer}.block_sparse_moe.{name}" for name in drawn for layer in range(LAYERS)
    }
    key = "what is computed of the sources"
    assert plan_fingerprint(plan, 0)[key] != plan_fingerprint(other, 0)[key]


def test_an_edited_mixtures_parts_are_those_of_the_expert_that_is_drawn_anew(tmp_path):
    model = make_model(tmp_path / "model")
    merge(plan_merge(upcycled(model, {}, {"residual_scale": 0.5})), tmp_path / "mixture")
    for name, keys in {"whole": {}, "split": {"granularity": 2}}.items():
        experts = [
            {"source_model": f"{tmp_path / 'mixture'}#0", "reinit": 0.5},
            {"source_model": f"{tmp_path / 'mixture'}#1"},
        ]
        document = {"base_model": str(tmp_path / "mixture"), "experts": experts, **keys}
        write_edit(plan_edit(parse_config(write_yaml(document))), tmp_path / name, dict)
    assert drawn_anew(tmp_path / "whole", model, 0, 1).sum() == WIDTH // 2
    whole, split = (weights(tmp_path / name) for name in ("whole", "split"))
    prefix = "model.layers.1.block_sparse_moe.experts"
    parts = [projections(split, f"{prefix}.{part}", MIXTRAL) for part in (0, 1)]
    for number, wanted in enumerate(projections(whole, f"{prefix}.0", MIXTRAL)):
        factor = 2 if number == 2 else 1
        assert np.array_equal(np.concatenate([part[number] for part in parts]), factor * wanted)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (0, "experts[0].reinit.share: expected a number above 0, found 0"),
        (1.5, "experts[0].reinit.share: expected a number of 1 or less, found 1.5"),
        ({"share": 0.5, "sead": 1}, "experts[0].reinit.sead: unknown key, did you mean seed?"),
        ({}, "experts[0].reinit.share: is missing"),
    ],
)
def test_what_is_no_share_is_refused(tmp_path, given, problem):
    with pytest.raises(ConfigError) as error:
        upcycled(tmp_path, {"reinit": given}, {})
    assert str(error.value) == f"config: 1 problem:\n  - {problem}"


def test_a_share_alone_and_its_settings_are_the_same(tmp_path):
    short, long = (upcycled(tmp_path, {"reinit": given}, {}) for given in (0.5, {"share": 0.5, "seed": 0}))
    assert json.loads(short.model_dump_json()) == json.loads(long.model_dump_json())
