"""Routers from chats: written by the base's template, and counted by whose messages they are."""

import json
import shutil
from pathlib import Path

import pytest

from moemerge import load_config, merge, plan_merge
from moemerge.config.loading import parse_config
from moemerge.config.schema import MergeConfig
from moemerge.errors import RefusedError, RouterError
from moemerge.export.importance import calibration_texts
from moemerge.planning.options import PlanOptions
from moemerge.routers.initialisation import init_routers
from moemerge.routers.prompts import encode_prompts

TEMPLATE = "{% for m in messages %}def {{ m.role }}: [{{ m.content }}] {% endfor %}"
PLAIN = ["The quick brown fox jumps over the lazy dog", "def main(argv): return argv", "Le chat dort sur le tapis"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, llamas) -> list[Path]:
    """A base and three experts, all with a chat template."""
    root = tmp_path_factory.mktemp("chats")
    folders = [shutil.copytree(folder, root / folder.name) for folder in llamas]
    for folder in folders:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folders


def config(models, prompts=PLAIN, **keys) -> MergeConfig:
    experts = [
        {"source_model": str(folder), "positive_prompts": prompt}
        for folder, prompt in zip(models[1:], prompts, strict=True)
    ]
    return parse_config(json.dumps({"base_model": str(models[0]), "gate_mode": "ridge", "experts": experts, **keys}))


def rows(given: MergeConfig) -> dict[int, bytes]:
    request = plan_merge(given).router_request
    return dict(init_routers(request, seed=0, progress=lambda *_: None).rows)


def asked(text: str, answer: str = "", system: str = "") -> dict:
    roles = (("system", system), ("user", text), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles if content]}


def test_a_chat_of_one_message_is_a_plain_prompt_in_the_template(models):
    chats = rows(config(models, [asked(text) for text in PLAIN]))
    assert chats == rows(config(models, router={"chat_prompts": True}))
    assert chats == rows(config(models, router={"chat_prompts": "auto"}))
    assert chats != rows(config(models))


def test_plain_prompts_stay_plain_where_one_expert_has_no_template(models, llamas):
    """Some in a template and some not would tell the router of the template, not of what they say."""
    mixed = [*models[:3], llamas[3]]
    assert rows(config(mixed, router={"chat_prompts": "auto"})) == rows(config(mixed))
    assert rows(config(mixed, router={"chat_prompts": True})) != rows(config(mixed))


def test_chats_count_by_role_and_what_does_not_count_is_read(models, tmp_path):
    chats = [asked(text, answer=text[::-1], system="The mouse") for text in PLAIN]
    found = encode_prompts(models[0], config(models, chats), 128, 0)
    plain = encode_prompts(models[0], config(models, [f"{text}\n\n{text[::-1]}" for text in PLAIN]), 128, 0)
    for chat, text in zip(found, plain, strict=True):
        assert len(chat.ids) > len(text.ids) > len(chat.counted_ids) > len(text.ids) / 2
    answers = encode_prompts(models[0], config(models, chats, router={"chat_roles": "assistant"}), 128, 0)
    assert [chat.ids for chat in answers] == [chat.ids for chat in found]
    assert all(0 < sum(some.counted) < sum(all_.counted) for some, all_ in zip(answers, found, strict=True))


def test_chats_in_files_make_the_same_routers_as_in_the_config(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chats = [asked(text, answer="and the mouse") for text in PLAIN]
    for number, chat in enumerate(chats):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(chat) + "\n")
    in_files = config(models).model_dump(by_alias=True)
    for number, expert in enumerate(in_files["experts"]):
        expert |= {"positive_texts": [f"{number}.jsonl"], "positive_prompts": []}
    read = encode_prompts(models[0], load_config(in_files), 128, 0)
    given = encode_prompts(models[0], config(models, chats), 128, 0)
    assert [(one.ids, one.counted) for one in read] == [(one.ids, one.counted) for one in given]


def test_without_a_pass_the_messages_alone_are_read(models, llamas):
    """By `cheap_embed`, which needs no template."""
    chats = [asked(text, answer="and the mouse", system="Be dry") for text in PLAIN]
    texts = [f"{text}\n\nand the mouse" for text in PLAIN]
    options = {"gate_mode": "cheap_embed", "router": {"chat_prompts": True}}
    assert rows(config(llamas, chats, **options)) == rows(config(llamas, texts, gate_mode="cheap_embed"))


@pytest.mark.parametrize(
    ("keys", "prompts", "place"),
    [
        ({}, [PLAIN[0], [PLAIN[1], asked("x")], PLAIN[2]], "experts[1].positive_prompts[1]: is a chat, and"),
        ({"router": {"chat_prompts": True}}, PLAIN, "router.chat_prompts:"),
    ],
)
def test_a_base_without_a_template_is_refused_in_the_plan(llamas, keys, prompts, place):
    steps = {
        "experts": "Choose a base model that has one (an instruct or chat model), add its chat_template.jinja, or give "
        "plain text under the key 'text'.",
        "router.": "Choose a base model that has one, or leave chat_prompts out.",
    }
    lacks = f"the tokenizer of {llamas[0]} has no chat template" + (" to put prompts into" if keys else "")
    with pytest.raises(RefusedError) as caught:
        plan_merge(config(llamas, prompts, **keys))
    assert str(caught.value) == f"{place} {lacks}. {steps[place[:7]]}"
    plan_merge(config(llamas, prompts, **keys), PlanOptions(needs_texts=False))


def test_chats_in_a_file_are_refused_for_such_a_base_with_file_and_line(llamas, tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(asked('x'))}\n")
    given = config(llamas, router={"calibration_texts": [str(tmp_path / "a.jsonl")], "load_prior": [1, 1, 1]})
    with pytest.raises(RefusedError, match=rf"^{tmp_path}/a\.jsonl, line 2: is a chat, and the tokenizer of "):
        plan_merge(given)


def test_a_chat_in_which_nobody_counts_is_refused(models):
    given = config(models, [asked("x"), *PLAIN[1:]], router={"chat_roles": ["tool"]})
    with pytest.raises(RouterError) as caught:
        encode_prompts(models[0], given, 128, 0)
    assert str(caught.value) == (
        "experts[0].positive_prompts[0]: the base model's tokenizer finds no tokens of tool in "
        "Chat(messages=(Message(role='user', content='x'),))."
    )


def test_the_card_and_the_copied_config_have_the_chats(models, tmp_path):
    chats = [asked(text, answer="and the mouse", system="Be dry") for text in PLAIN]
    given = config(models, chats)
    merge(plan_merge(given), tmp_path / "out")
    assert "`The quick brown fox jumps over the lazy dog and the mouse`" in (tmp_path / "out" / "README.md").read_text()
    assert load_config(tmp_path / "out" / "moemerge_config.yaml").experts == given.experts


def test_an_importance_matrix_reads_chats_one_by_one_and_plain_prompts_together(models):
    given = config(models, [[asked("x"), "The fox", asked("y"), "jumps"], *PLAIN[1:]])
    kinds, notes = calibration_texts(given)
    first = kinds[f"experts[0] {models[1]}"]
    assert [getattr(one, "messages", one) for one in first[:2]] == [
        prompt.messages for prompt in given.experts[0].positive_prompts[::2]
    ]
    assert first[2:] == ["The fox\n\njumps"]
    assert notes == []
