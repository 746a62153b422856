"""Chats in tokens: what the base's own template writes, and which tokens of it count."""

import json
from pathlib import Path

import pytest

from moemerge.chats import Chat, Message
from moemerge.errors import RefusedError
from moemerge.passes.chats import encode_chat, encode_question, has_chat_template
from moemerge.passes.tokens import by_tokenizers, by_transformers, cut_windows
from tests.support.chats import CHATML, DATED, GEMMA, LLAMA2, PARTS, THINKING, chat_tokenizer

BASE = Path("models/base")


def chat(*said: str, system: str = "") -> Chat:
    """Messages of a user and an assistant in turn."""
    turns = [Message(("user", "assistant")[place % 2], content) for place, content in enumerate(said)]
    return Chat((*([Message("system", system)] if system else []), *turns), "chats.jsonl, line 3")


def counted(tokenizer, given: Chat, roles=("user", "assistant")) -> str:
    """The text of the tokens that count, with a bar wherever others stand between them."""
    found = encode_chat(tokenizer, BASE, given, roles)
    runs, last = [], 1
    for token, special in zip(found.ids, found.special, strict=True):
        if not special:
            runs += [[]] if last else []
            runs[-1].append(token)
        last = special
    return "|".join(tokenizer.decode(run) for run in runs)


@pytest.mark.parametrize(
    ("template", "system", "shown"),
    [
        (CHATML, "", "The fox|user|The fox jumps|Le chat dort"),
        (CHATML, "The fox", "The fox|user|The fox jumps|Le chat dort"),
        (LLAMA2, "The fox", "The fox|user|The fox jumps|Le chat dort"),
        (GEMMA, "", "The fox|user|The fox jumps|Le chat dort"),
        (DATED, "The fox", "The fox|user|The fox jumps|Le chat dort"),
    ],
    ids=["chatml", "chatml with a system prompt", "llama 2", "gemma", "dated"],
)
def test_tokens_of_messages_count_and_those_of_the_template_do_not(template, system, shown):
    """Also of messages that read like a part of the template, or like one another."""
    tokenizer = chat_tokenizer(template)
    given = chat("The fox", "user", "The fox jumps", "Le chat dort", system=system)
    assert counted(tokenizer, given) == shown
    messages = [{"role": message.role, "content": message.content} for message in given.messages]
    if template != DATED:
        found = encode_chat(tokenizer, BASE, given, ()).ids
        assert found == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_templates_of_multimodal_models_are_given_text_as_a_part():
    tokenizer, given = chat_tokenizer(PARTS), chat("The fox", "user", "The fox jumps", "Le chat dort")
    assert counted(tokenizer, given) == "The fox|user|The fox jumps|Le chat dort"
    asked = encode_question(tokenizer, BASE, chat("The fox"))
    assert tokenizer.decode(asked) == "user: The fox"


def test_the_option_says_whose_messages_count():
    tokenizer, given = chat_tokenizer(CHATML), chat("The fox", "jumps", system="Be dry")
    assert counted(tokenizer, given, ("assistant",)) == "jumps"
    assert counted(tokenizer, given, ("system", "user")) == "Be dry|The fox"
    assert counted(tokenizer, given, ("tool",)) == ""


def test_what_a_template_strips_or_leaves_out_is_not_looked_for():
    given = chat("  The fox \n", "<think>\nhm\n</think>\n\nit jumps", "and", "<think>\nso\n</think>\n\nthe dog")
    assert counted(chat_tokenizer(THINKING), given) == "  The fox \n|it jumps|and|the dog"
    assert counted(chat_tokenizer(GEMMA), chat("  The fox \n", " jumps ")) == "The fox|jumps"


def test_a_template_that_says_the_date_says_the_same_every_day():
    tokenizer = chat_tokenizer(DATED)
    ids = encode_chat(tokenizer, BASE, chat("x"), ()).ids
    assert tokenizer.decode(ids) == "<s>Today Date: 26 Jul 2024\nuser: x\n"


@pytest.mark.parametrize(
    ("template", "given", "problem"),
    [
        (
            None,
            chat("x"),
            "is a chat, and the tokenizer of models/base has no chat template. Choose a base model that has one (an "
            "instruct or chat model), add its chat_template.jinja, or give plain text under the key 'text'.",
        ),
        (
            GEMMA,
            chat("x", system="y"),
            "the chat template of models/base refuses it: System role not supported. Change the chat's roles or their "
            "order, or give plain text.",
        ),
        (
            LLAMA2,
            Chat((Message("assistant", "x"),), "chats.jsonl, line 3"),
            "the chat template of models/base refuses it: Conversation roles must alternate "
            "user/assistant/user/assistant/. Change the chat's roles or their order, or give plain text.",
        ),
        (
            "{{ messages[0].nothing.more }}",
            chat("x"),
            "the chat template of models/base refuses it: 'dict object' has no attribute 'nothing'. Change the chat's "
            "roles or their order, or give plain text.",
        ),
    ],
    ids=["no template", "a role", "an order", "an error of its own"],
)
def test_what_no_template_writes_is_refused_with_its_place(template, given, problem):
    with pytest.raises(RefusedError) as caught:
        encode_chat(chat_tokenizer(template), BASE, given, ("user",))
    assert str(caught.value) == f"chats.jsonl, line 3: {problem}"


def test_the_refusal_of_a_chat_is_not_taken_for_one_of_the_tokenizer(tmp_path):
    chat_tokenizer(GEMMA).save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match="refuses it: System role not supported"):
        by_transformers(tmp_path)(chat("x", system="y"))


def test_a_template_is_found_where_transformers_finds_it(tmp_path):
    assert not has_chat_template(tmp_path)
    for name, text in (
        ("chat_template.jinja", "{{ messages }}"),
        ("chat_template.json", json.dumps({"chat_template": "{{ messages }}"})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": "x"}]})),
    ):
        (tmp_path / name).write_text(text)
        assert has_chat_template(tmp_path), name
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "chat_template.json").write_text('{"chat_template": ""}')
    assert not has_chat_template(tmp_path)


@pytest.fixture
def encode(tmp_path):
    """With a BOS that the template writes itself, and a long system prompt."""
    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML.replace("a helpful assistant", "a helpful assistant. " * 5))
    tokenizer.save_pretrained(tmp_path)
    return by_transformers(tmp_path)


def test_windows_of_chats_hold_the_template_and_begin_as_the_tokenizer_does(encode):
    given = chat("The fox jumps over the lazy dog. " * 9, "Le chat dort. " * 9)
    ids, special = encode(given)
    windows = cut_windows([given], encode, tokens=1000, length=150)
    assert len(windows) > 1
    assert all(window.ids[0] == 0 and not window.counted[0] and any(window.counted) for window in windows)
    read = [token for window in windows for token in window.ids[1:]]
    assert read == ids[1 : len(read) + 1]
    marks = [mark for window in windows for mark in window.counted[1:]]
    assert marks == [not added for added in special[1 : len(read) + 1]]


def test_a_system_prompt_takes_nothing_of_the_window_that_a_document_gets(encode):
    chats = [chat(f"The fox jumps {number}. " + "over the lazy dog " * 60) for number in range(4)]
    lead = encode(chats[0])[1].index(0) - 1
    assert lead > 64
    windows = cut_windows(chats, encode, tokens=600, length=512, even=True)
    assert sorted(window.document for window in windows[:4]) == [0, 1, 2, 3]
    assert {sum(window.counted) for window in windows[:4]} == {150}
    assert {len(window.ids) for window in windows[:4]} == {1 + lead + 150}


def test_chats_in_which_nobody_counts_give_no_window(encode):
    assert cut_windows([Chat((Message("system", "The fox"),))], encode, tokens=100, length=32) == []


def test_a_long_chat_is_read_in_part():
    assert chat("abc", "defgh", "ij").shortened(5) == chat("abc", "de")
    assert len(chat(*["x"] * 1000).shortened(10**6).messages) == 200


def test_without_a_template_the_messages_alone_are_read(tmp_path):
    chat_tokenizer(None).save_pretrained(tmp_path)
    encode = by_tokenizers(tmp_path / "tokenizer.json", ("user", "assistant"))
    assert encode(chat("The fox", "jumps", system="Be dry")) == encode("The fox\n\njumps")
