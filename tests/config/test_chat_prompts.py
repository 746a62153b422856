"""Prompts of a config that are chats."""

import pytest

from moemerge.chats import Chat, Message
from moemerge.config.loading import load_config, parse_config
from moemerge.errors import ConfigError

CONFIG = """\
base_model: base
experts:
- source_model: a
  positive_prompts:
  - messages:
    - {role: user, content: Hi}
    - {role: assistant, content: Hello}
  - plain
- source_model: b
  positive_prompts: {prompt: How?, completion: So.}
router: {chat_prompts: auto, chat_roles: assistant}
"""
FIRST = Chat((Message("user", "Hi"), Message("assistant", "Hello")))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return list(caught.value.problems)


def test_a_prompt_may_be_a_chat_and_one_chat_a_list_of_prompts():
    config = parse_config(CONFIG)
    assert config.experts[0].positive_prompts == [FIRST, "plain"]
    assert config.experts[1].positive_prompts == [Chat((Message("user", "How?"), Message("assistant", "So.")))]
    assert (config.router.chat_prompts, config.router.chat_roles) == ("auto", ["assistant"])
    assert parse_config(CONFIG.replace("auto, chat_roles: assistant", "on")).router.chat_prompts is True


def test_a_changed_config_is_written_and_read_with_its_chats():
    config = parse_config(CONFIG)
    changed = config.model_copy(update={"experts_per_token": 1}).rechecked()
    assert changed.experts == config.experts
    assert parse_config(changed.text).experts == config.experts
    assert load_config(config.model_dump(by_alias=True)).experts == config.experts


def test_every_problem_of_a_chat_has_its_line_and_place():
    text = CONFIG.replace("role: user", "rolle: user").replace("content: Hello", "content: [1]")
    text = text.replace(
        "- plain",
        "- {Question: how}\n"
        "  - {messages: [{role: gpt, content: x, nam: y}]}\n"
        "  - {messages: [{role: user, content: x, rol: y}], mesages: 2}\n"
        "  - {messages: [{role: user, content: ' '}]}\n"
        "  - {messages: []}",
    )
    text = text.replace("{prompt: How?", "{prompt: 3").replace("auto", "maybe").replace("assistant}\n", "bot}\n")
    text = text.replace("{rolle: user, content: Hi}", "{role: user, content: Hi}\n    - {rolle: user, content: Hi}")
    known = "system, developer, user, assistant or tool"
    assert problems(text) == [
        f"line 7: experts[0].positive_prompts[0].messages[1].role: expected {known}",
        "line 8: experts[0].positive_prompts[0].messages[2].content: expected a text, found [1]; leave out messages that "
        "hold anything else",
        "line 9: experts[0].positive_prompts[1]: expected text in quotes, or a chat: messages with role and content, found "
        "{'Question': 'how'}",
        f"line 10: experts[0].positive_prompts[2].messages[0].role: expected {known}, found 'gpt'",
        "line 11: experts[0].positive_prompts[3].mesages: unknown key, did you mean messages?",
        "line 11: experts[0].positive_prompts[3].messages[0].rol: unknown key, did you mean role?",
        "line 12: experts[0].positive_prompts[4]: the prompt is empty",
        "line 13: experts[0].positive_prompts[5].messages: holds no messages",
        "line 15: experts[1].positive_prompts[0].prompt: expected a text or a list of messages, found 3",
        "line 16: router.chat_prompts: expected true, false or auto, found 'maybe'",
        f"line 16: router.chat_roles[0]: expected {known}, found 'bot'",
    ]


def test_a_prompt_of_more_messages_than_are_read_is_refused():
    messages = ", ".join(["{role: user, content: x}"] * 201)
    text = CONFIG.replace("{prompt: How?, completion: So.}", f"{{messages: [{messages}]}}")
    assert problems(text) == [
        "line 10: experts[1].positive_prompts[0]: has 201 messages; at most 200 are read: split it"
    ]


def test_experts_with_the_same_chats_are_refused():
    same = "{prompt: How?, completion: So.}"
    text = f"base_model: b\nexperts:\n- {{source_model: a, positive_prompts: {same}}}\n- {{source_model: c, positive_prompts: [{same}]}}\n"
    assert [problem.partition(",")[0] for problem in problems(text)] == [
        "line 2: experts: all experts have the same prompts"
    ]
