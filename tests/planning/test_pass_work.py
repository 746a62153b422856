"""The plan knows how much the base model has to read for the routers, from sizes of files and models alone."""

import json

import pytest

from moemerge import load_config, plan_merge
from moemerge.planning import pass_work
from moemerge.planning.pass_work import PassWork
from tests.support.models import write_config

# Numbers in a layer of the tests' models: attention, FFN, two norms.
HIDDEN, FFN, HEADS = 32, 48, 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32
EXPERT = 3 * HIDDEN * FFN


def work(tmp_path, models, experts, **keys) -> PassWork | None:
    path = write_config(tmp_path / "c.yaml", models[0], [])
    document = {"base_model": str(models[0]), "gate_mode": "hidden", "experts": experts, **keys}
    path.write_text(json.dumps(document))
    return plan_merge(load_config(path)).pass_work


def test_layers_after_the_last_router_and_its_ffn_are_not_counted(tmp_path, llamas):
    experts = [{"source_model": str(m), "positive_prompts": [x * 300]} for m, x in zip(llamas[1:], "xyz", strict=True)]
    found = work(tmp_path, llamas, experts)
    run = 3 * HEADS + 2 * EXPERT
    assert found == PassWork(300, 3, 2 * run * 300 + 100 * run)
    found = work(tmp_path, llamas, experts, moe_layers=[0, 1])
    assert found == PassWork(300, 2, (2 * 300 + 100) * (2 * HEADS + EXPERT))


def test_experts_weights_are_counted_where_they_are_read(tmp_path, llamas):
    experts = [{"source_model": str(m), "positive_prompts": [x * 300]} for m, x in zip(llamas[1:], "xyz", strict=True)]
    found = work(tmp_path, llamas, experts, gate_mode="combined")
    changes = 3 * 3 * 2 * 2 * HIDDEN * FFN
    run = 3 * HEADS + 2 * EXPERT
    assert found == PassWork(550, 3, 2 * run * 550 + 100 * (run + changes))


def test_texts_count_up_to_the_tokens_that_are_read(tmp_path, llamas):
    (tmp_path / "short.txt").write_text("x" * 900)
    (tmp_path / "long.txt").write_text("x" * 90_000)
    texts = ["short.txt", "long.txt", "*.txt"]
    experts = [
        {"source_model": str(model), "positive_texts": str(tmp_path / name)}
        for model, name in zip(llamas[1:], texts, strict=True)
    ]
    found = work(tmp_path, llamas, experts, router={"tokens_per_expert": 1000})
    assert found.tokens == 300 + 1000 + 1000


def test_unsorted_texts_are_read_twice(tmp_path, llamas):
    (tmp_path / "mixed.txt").write_text("x" * 900)
    experts = [{"source_model": str(model)} for model in llamas[1:]]
    found = work(tmp_path, llamas, experts, gate_mode="auto", router={"calibration_texts": str(tmp_path / "mixed.txt")})
    run, changes = 3 * HEADS + 2 * EXPERT, 3 * 3 * 2 * 2 * HIDDEN * FFN
    assert found == PassWork(550, 3, 2 * run * (250 + 2 * 300) + 100 * (2 * run + changes))


def test_there_is_no_work_where_the_base_is_not_run(tmp_path, llamas):
    assert work(tmp_path, llamas, [{"source_model": str(model)} for model in llamas[1:]], gate_mode="random") is None


def test_seconds_are_those_of_this_cpu(monkeypatch):
    monkeypatch.setattr(pass_work, "_operations_per_second", lambda: 2e11)
    assert PassWork(1, 1, 3e12).seconds == pytest.approx(20)
    monkeypatch.undo()
    assert 1e-6 < PassWork(1, 1, 1e9).seconds < 100  # between 10 MFLOPS and a PFLOPS
