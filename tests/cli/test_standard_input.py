"""Standard input as a config and as text."""

import io
from pathlib import Path

import pytest

from moemerge import RefusedError
from moemerge.cli.evaluation import by_name
from moemerge.cli.plan_request import PlanRequest
from moemerge.cli.standard_input import _copied_input
from moemerge.errors import ConfigError
from moemerge.texts.documents import find_files, read_documents


@pytest.fixture
def given(monkeypatch):
    """Puts bytes on standard input."""
    _copied_input.cache_clear()
    yield lambda held: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(held)))
    _copied_input.cache_clear()


def test_a_config_is_read_from_standard_input(given):
    given(b"base_model: b\nexperts: [{source_model: x}, {source_model: y}]\n")
    assert PlanRequest(Path("-")).read().expert_names == ("x", "y")


def test_its_problems_have_lines(given):
    given(b"base_model: b\nexperts: [{source_model: x}, {source_model: y}]\ndtyp: bf16\n")
    with pytest.raises(ConfigError) as error:
        PlanRequest(Path("-")).read()
    assert str(error.value) == ("standard input: 1 problem:\n  - line 3: dtyp: unknown key, did you mean dtype?")


@pytest.mark.parametrize(
    ("held", "documents"),
    [
        ("é, one\n<|document|>\ntwo\n", ["é, one", "two"]),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
    ],
)
def test_text_of_a_name_is_read_from_standard_input(given, held, documents):
    given(held.encode())
    data = by_name(["code=-", "code=other.txt"])
    assert data["code"][1] == "other.txt"
    assert read_documents(find_files(data["code"][:1], "--data code=")) == documents


def test_other_bytes_are_refused(given):
    given(b"\xff\xfe")
    with pytest.raises(RefusedError, match=r"^standard input: is not text in UTF-8\.$"):
        by_name(["code=-"])
