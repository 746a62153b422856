"""Documents in files, and the windows of tokens that are cut from them."""

import json

import pytest

from moemerge.errors import RefusedError
from moemerge.passes.tokens import by_transformers, counted_mask, cut_windows
from moemerge.texts import documents
from moemerge.texts.documents import find_files, read_documents
from tests.support.models import tokenizer


def test_files_folders_and_patterns_lead_to_documents(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "one.txt").write_text("first\n<|document|>\nsecond\nline\n<|document|>  \n\n")
    (tmp_path / "deep" / "b.jsonl").write_text(json.dumps({"text": "third", "id": 3}) + "\n\n" + '"fourth"\n')
    (tmp_path / "deep" / "er" / "a.txt").write_text("fifth")
    (tmp_path / "deep" / "not.md").write_text("no")
    monkeypatch.chdir(tmp_path)
    assert read_documents(find_files(["one.txt"], "x")) == ["first", "second\nline"]
    assert read_documents(find_files(["deep"], "x")) == ["third", "fourth", "fifth"]
    assert read_documents(find_files([f"{tmp_path}/**/*.txt", "one.txt"], "x")) == ["fifth", "first", "second\nline"]


@pytest.mark.parametrize(
    "pattern", ["missing.txt", "*.txt", "folder", "missing.md", "~nobody/a.txt", "Write code. " * 30]
)
def test_what_leads_to_no_text_is_refused(tmp_path, monkeypatch, pattern):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.md").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedError) as caught:
        find_files([pattern], "experts[0].positive_texts")
    assert str(caught.value) == (
        f"experts[0].positive_texts[0]: {pattern!r} leads to no .txt, .jsonl or .parquet file. Paths count from the config's folder, else from the current one."
    )


@pytest.mark.parametrize(("pattern", "found"), [("b.json", "b.json"), ("*.*", "a.TXT"), ("[b-z]*", "b.json")])
def test_a_file_whose_ending_alone_is_wrong_is_said_to_be_there(tmp_path, monkeypatch, pattern, found):
    for name in ("a.TXT", "b.json", "c.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedError) as caught:
        find_files([pattern], "--data code")
    assert str(caught.value) == (
        f"--data code[0]: '{found}' is there, but texts are read from .txt, .jsonl and .parquet files alone. "
        "Give plain text the ending .txt, and JSON lines .jsonl."
    )


def test_lines_that_are_no_json_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n{\n')
    with pytest.raises(RefusedError) as caught:
        read_documents([file])
    assert str(caught.value).startswith(f"{file}, line 2: is not JSON: ")


def test_half_a_letter_in_json_is_read_as_a_question_mark(tmp_path, encode):
    (tmp_path / "a.jsonl").write_text('{"text": "The \\ud83d fox"}\n')
    assert read_documents([tmp_path / "a.jsonl"]) == ["The ? fox"]
    assert cut_windows(["The ? fox"], encode, tokens=10, length=10)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RefusedError, match=r"a\.txt: cannot be read as text in UTF-8"):
        read_documents([tmp_path / "a.txt"])


@pytest.fixture
def encode(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    return by_transformers(tmp_path)


def test_windows_go_round_the_documents_until_there_are_enough_tokens(encode):
    documents = ["The fox jumps over the lazy dog. " * 20, "def main(argv): return", "Le chat dort " * 30]
    windows = cut_windows(documents, encode, tokens=100, length=16)
    assert sum(len(window.ids) - 1 for window in windows) == 100
    assert {window.document for window in windows[:3]} == {0, 1, 2}
    assert all(window.ids[0] == 1 and window.counted[0] is False and all(window.counted[1:]) for window in windows)
    for number, text in enumerate(documents):
        joined = [token for window in windows if window.document == number for token in window.ids[1:]]
        assert joined == encode(text)[0][1 : len(joined) + 1]
    assert cut_windows(documents, encode, tokens=100, length=16, seed=1) != windows
    assert cut_windows(documents, encode, tokens=100, length=16) == windows


def test_every_document_gets_a_window_if_there_is_room(encode):
    documents = ["The fox jumps over the lazy dog. " * 100] * 5
    even = cut_windows(documents, encode, tokens=400, length=300, even=True)
    assert sorted(window.document for window in even) == [0, 1, 2, 3, 4]
    assert {window.document for window in cut_windows(documents, encode, tokens=400, length=300)} != {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("special", "counted"),
    [([1, 0, 0], [False, True, True]), ([0, 0, 1], [False, True, False]), ([0], [True]), ([1, 0], [False, True])],
)
def test_the_first_token_does_not_count(special, counted):
    assert list(counted_mask(special)) == counted


def test_no_more_lines_are_read_than_texts_are_used(tmp_path, monkeypatch):
    """A file may be larger than the memory."""
    monkeypatch.setattr(documents, "_CHARACTERS", 20)
    (tmp_path / "a.jsonl").write_text('"aaaaaaaa"\n"bbbbbbbb"\n{')
    assert read_documents([tmp_path / "a.jsonl"]) == ["aaaaaaaa", "bbbbbbbb"]
