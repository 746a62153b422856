"""Text that judges a model is told from text that its routers were made from."""

import json
from pathlib import Path

import pytest

from moemerge import merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.evaluation.evaluator import evaluate, read_domains
from moemerge.evaluation.seen_text import seen_text_notes
from moemerge.evaluation.settings import EvaluationSettings
from tests.support.models import TEXT, make_model

LINES, PROMPT = TEXT.split("\n"), "the quick dog"
SEPARATOR = "\n<|document|>\n"
ROUTER = {"load_prior": [1, 2]}


def note(count: int, available: int, name: str) -> str:
    return (
        f"the routers were made from {count} of the {available} documents of {name}, so its figures say less of other "
        "text: judge by documents that the config does not name"
    )


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "fox.txt").write_text(SEPARATOR.join([LINES[0][:44], LINES[0][45:]]))
    (tmp_path / "code.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": LINES[1]}]}) + "\n")
    return tmp_path


def config_of(models: list[str], texts: Path, **keys) -> MergeConfig:
    experts = [
        {"source_model": models[1], "positive_texts": str(texts / "fox.txt")},
        {"source_model": models[2], "positive_prompts": [PROMPT]},
    ]
    return parse_config(json.dumps({"base_model": models[0], "gate_mode": "hidden", "experts": experts, **keys}))


def test_documents_are_compared_whatever_file_they_are_in(texts):
    config = config_of(["base", "fox", "code"], texts, router=ROUTER | {"calibration_texts": str(texts / "code.jsonl")})
    (texts / "other.txt").write_text(SEPARATOR.join([LINES[0][45:], "unseen", PROMPT]))
    domains = {"fox": "fox.txt", "mixed": "other.txt", "chats": "code.jsonl"}
    documents = read_domains({name: [str(texts / file)] for name, file in domains.items()})
    documents["unseen"] = ["nobody named this"]
    assert seen_text_notes(config, documents) == [note(2, 2, "fox"), note(2, 3, "mixed"), note(1, 1, "chats")]


@pytest.mark.parametrize("gone", ["deleted", "damaged"])
def test_texts_that_cannot_be_read_any_more_are_left_out(texts, gone):
    config, file = config_of(["base", "fox", "code"], texts), texts / "fox.txt"
    documents = read_domains({"fox": [str(file)]}) | {"code": [PROMPT]}
    file.unlink() if gone == "deleted" else file.write_bytes(b"\xff\xff")
    assert seen_text_notes(config, documents) == [note(1, 1, "code")]
    assert seen_text_notes(None, documents) == []


def test_an_evaluation_has_these_notes(texts):
    models = [str(make_model(texts / name, seed)) for seed, name in enumerate(("base", "fox", "code"))]
    merge(plan_merge(config_of(models, texts)), texts / "out")
    (texts / "unseen.txt").write_text(LINES[0][10:])
    data = {"fox": [str(texts / "fox.txt")], "code": [str(texts / "unseen.txt")]}
    found = evaluate(texts / "out", data, EvaluationSettings(tokens=100))
    assert [line for line in found.notes if "routers were made" in line] == [note(2, 2, "fox")]
