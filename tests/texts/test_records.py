"""Chats in files, in the forms that are in use, and Parquet."""

import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from moemerge.chats import Chat, Message
from moemerge.errors import RefusedError
from moemerge.texts import documents
from moemerge.texts.documents import find_files, read_documents

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SAID = Chat((Message("user", "Hi"), Message("assistant", "Hello")))
FORMS = {
    "messages": {"messages": [USER, ASSISTANT], "prompt": "Hi", "text": "of both", "id": 7},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "prompt": {"prompt": "Hi", "completion": "Hello"},
    "messages of a prompt": {"prompt": [USER], "completion": [ASSISTANT]},
    "instruction": {"instruction": "Hi", "output": "Hello", "input": ""},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]},
}
KEYS = "text, messages, conversations, prompt and completion, instruction and output"


def lines(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_chat_is_read(tmp_path, form):
    (found,) = read_documents([lines(tmp_path / "a.jsonl", FORMS[form])])
    assert found == SAID
    assert found.place == f"{tmp_path / 'a.jsonl'}, line 1"


def test_an_instruction_is_asked_with_its_input(tmp_path):
    record = {"instruction": "Translate", "input": "le chat", "output": "the cat"}
    (found,) = read_documents([lines(tmp_path / "a.jsonl", record)])
    assert found.messages == (Message("user", "Translate\n\nle chat"), Message("assistant", "the cat"))


def test_chats_in_which_nobody_says_anything_are_left_out(tmp_path):
    blank = {"prompt": " ", "completion": ""}
    assert read_documents([lines(tmp_path / "a.jsonl", blank, FORMS["prompt"])]) == [SAID]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (3, f"expected a text, or an object with {KEYS}; found 3."),
        ({"body": "x", "id": 1}, f"expected a text, or an object with {KEYS}; found body, id."),
        ({"prompt": "x"}, f"expected a text, or an object with {KEYS}; found prompt."),
        ({"text": None}, "text: expected a text, found None."),
        ({"messages": "x"}, "messages: expected a list of messages, found 'x'."),
        ({"messages": []}, "messages: holds no messages."),
        ({"messages": ["x"]}, "messages[0]: expected a message with role and content, found 'x'."),
        (
            {"messages": [USER, {"role": "gpt", "content": "x"}]},
            "messages[1].role: expected system, developer, user, assistant or tool, found 'gpt'.",
        ),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "conversations[0].from: expected human, gpt, system, developer, user, assistant or tool, found 'bot'.",
        ),
        (
            {"messages": [{"role": "user"}]},
            "messages[0].content: expected a text, which is missing; leave out messages that hold anything else.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "messages[0].content: expected a text, found [{'type': 'image'}]; leave out messages that hold "
            "anything else.",
        ),
        ({"prompt": 3, "completion": "x"}, "prompt: expected a text or a list of messages, found 3."),
        ({"instruction": "x", "input": 3, "output": "y"}, "input: expected a text, found 3."),
    ],
)
def test_records_that_are_no_documents_are_named_with_file_and_line(tmp_path, record, problem):
    file = lines(tmp_path / "a.jsonl", FORMS["messages"], record)
    with pytest.raises(RefusedError) as caught:
        read_documents([file])
    assert str(caught.value) == f"{file}, line 2: {problem}"


@pytest.mark.parametrize(("first", "second"), [("text", "chat"), ("chat", "text")])
def test_a_file_of_both_kinds_is_refused(tmp_path, first, second):
    records = {"text": {"text": "x"}, "chat": FORMS["prompt"]}
    file = lines(tmp_path / "a.jsonl", records[first], records[first], records[second])
    with pytest.raises(RefusedError) as caught:
        read_documents([file])
    assert str(caught.value) == (
        f"{file}, line 3: is a {second}, and {file}, line 1 is a {first}. Put them into different files."
    )


def test_half_a_letter_in_a_message_is_read_as_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "The \\ud83d fox"}]}\n')
    assert read_documents([tmp_path / "a.jsonl"])[0].messages[0].content == "The ? fox"


def table(path, *records):
    parquet.write_table(pa.Table.from_pylist(list(records)), path)
    return path


def test_rows_of_parquet_are_documents(tmp_path):
    table(tmp_path / "a.parquet", *[{"id": n, "messages": [USER, ASSISTANT]} for n in range(3)])
    table(tmp_path / "b.parquet", {"text": "The fox"}, {"text": " "}, {"text": "Le chat"})
    first, _, last, *texts = read_documents(find_files([str(tmp_path)], "x"))
    assert first == SAID
    assert last.place == f"{tmp_path / 'a.parquet'}, row 3"
    assert texts == ["The fox", "Le chat"]


def test_parquet_without_a_known_column_or_damaged_is_refused(tmp_path):
    with pytest.raises(RefusedError) as caught:
        read_documents([table(tmp_path / "a.parquet", {"body": "x", "output": "y"})])
    assert str(caught.value) == (
        f"{tmp_path / 'a.parquet'}: expected a text, or an object with {KEYS}; found body, output."
    )
    with pytest.raises(RefusedError) as caught:
        read_documents([table(tmp_path / "n.parquet", {"text": "x"}, {"text": None})])
    assert str(caught.value) == f"{tmp_path / 'n.parquet'}, row 2: text: expected a text, found None."
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(RefusedError, match=r"b\.parquet: cannot be read as Parquet: "):
        read_documents([tmp_path / "b.parquet"])


def test_without_pyarrow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    file = table(tmp_path / "a.parquet", {"text": "x"})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RefusedError) as caught:
        read_documents([file])
    assert str(caught.value) == (
        f"{file}: to read Parquet, pyarrow is needed: pip install pyarrow, or save it as .jsonl."
    )


def test_files_are_read_only_as_far_as_needed(tmp_path, monkeypatch):
    """What comes after is not looked at: else a row that is no text would be refused."""
    monkeypatch.setattr(documents, "_CHARACTERS", 100)
    long = [{"text": "a text of 25 characters.."} for _ in range(5)]
    assert len(read_documents([table(tmp_path / "a.parquet", *long, *[{"text": None}] * 100)])) == 4
    file = lines(tmp_path / "a.jsonl", *long)
    file.write_text(file.read_text() + "no JSON\n")
    assert len(read_documents([file])) == 3
