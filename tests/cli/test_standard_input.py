"""Standard input as a config and as text."""

import io
from pathlib import Path

import pytest

from moemerge import RefusedError
from moemerge.cli import main
from moemerge.cli.evaluation import by_name
from moemerge.cli.plan_request import PlanRequest
from moemerge.cli.standard_input import _copied_input, is_terminal
from moemerge.errors import ConfigError
from moemerge.texts.documents import find_files, read_documents


@pytest.fixture
def given(monkeypatch):
    """Puts bytes on standard input."""
    _copied_input.cache_clear()
    yield lambda held: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(held)))
    _copied_input.cache_clear()


def told(command: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """The exit code of a command, and what it prints on standard error."""
    monkeypatch.setattr("sys.argv", ["moemerge", *command])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


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


@pytest.mark.parametrize("held", [b"", b" \n\n"])
def test_an_empty_input_is_called_standard_input(given, held, monkeypatch, capsys):
    given(held)
    for command in (["routes", "out", "--file", "-"], ["eval", "out", "--data", "code=-"]):
        assert told(command, monkeypatch, capsys) == (2, "error: standard input: holds no text.\n")


def test_a_closed_input_is_an_empty_one(monkeypatch, capsys):
    _copied_input.cache_clear()
    monkeypatch.setattr("sys.stdin", None)
    assert not is_terminal()
    for command, message in (
        (["plan", "-"], "standard input: holds no keys. `moemerge init BASE EXPERT...` writes a merge config."),
        (["generate", "out", "-"], "the prompt is empty. Give a text to answer or to continue."),
        (["routes", "out", "--file", "-"], "standard input: holds no text."),
    ):
        assert told(command, monkeypatch, capsys) == (2, f"error: {message}\n")
