"""Chats in `eval`, `routes` and `tune`: whose messages count, against the whole model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from moemerge import load_config, merge, plan_merge
from moemerge.cli import main
from moemerge.evaluation.evaluator import evaluate, read_domains
from moemerge.evaluation.figures import MERGED
from moemerge.evaluation.routes.tracer import trace_routes
from moemerge.evaluation.runnable import open_mixture
from moemerge.evaluation.settings import EvaluationSettings, TraceSettings
from moemerge.texts.documents import read_documents
from moemerge.tuning.batches import Batches
from moemerge.tuning.settings import Settings, split_documents
from tests.support.models import TEXT, load, tokenizer

TEMPLATE = "{% for m in messages %}{{ '' if loop.first else ' ' }}def {{ m.role }}: {{ m.content }} ]{% endfor %}"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def out(tmp_path_factory, llamas):
    root = tmp_path_factory.mktemp("chats")
    base = shutil.copytree(llamas[0], root / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    experts = [{"source_model": str(folder)} for folder in llamas[1:]]
    plan = plan_merge(load_config({"base_model": str(base), "gate_mode": "random", "experts": experts}))
    merge(plan, root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    records = [
        {"prompt": " ".join(WORDS[n : n + 3]), "completion": " ".join(WORDS[n + 3 : n + 9])}
        for n in range(0, len(WORDS) - 9, 2)
    ]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def test_the_loss_is_that_of_the_messages_that_count(out, chats):
    """Against transformers' own model, over the text that the template makes, summed over an assistant's tokens."""
    found = evaluate(out, {"chat": [chats]}, EvaluationSettings(roles=("assistant",), tokens=10**5))
    model, tokens = load(out), tokenizer()
    total, count = 0.0, 0
    for chat in read_documents([Path(chats)]):
        asked, answered = (message.content for message in chat.messages)
        head = f"def user: {asked} ] def assistant: "
        encoded = tokens(f"{head}{answered} ]", add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        inside = [
            max(start, len(head)) < min(end, len(head) + len(answered)) for start, end in encoded["offset_mapping"]
        ]
        total += float(losses[torch.tensor(inside[1:])].sum())
        count += sum(inside[1:])
    assert found.domains[0].tokens == count
    assert found.losses[MERGED]["chat"].value == pytest.approx(total / count, rel=1e-4)
    both = evaluate(out, {"chat": [chats]}, EvaluationSettings(tokens=10**5))
    assert both.domains[0].tokens > count


def test_routes_shows_the_messages_one_under_the_other(out, chats):
    chat = read_documents([Path(chats)])[0]
    asked, answered = (message.content for message in chat.messages)
    (found,) = trace_routes(out, {"a": chat}).texts
    assert "".join(found.tokens) == f"{asked}\n{answered}".replace("\n ", "\n")
    (found,) = trace_routes(out, {"a": chat}, TraceSettings(roles=("assistant",))).texts
    assert "".join(found.tokens) == answered


def test_tuning_trains_on_the_messages_that_count(out, chats):
    mixture = open_mixture(out)
    documents = split_documents(read_domains({"fox": [chats]}), 0)

    def batches(*roles: str) -> Batches:
        return Batches.cut(mixture, documents, Settings(roles=roles, steps=2, tokens_per_step=64))

    some, both = batches("assistant"), batches("user", "assistant")
    assert some.training.windows[0].ids == both.training.windows[0].ids
    assert sum(some.training.windows[0].counted) < sum(both.training.windows[0].counted)
    assert sum(some.held_out.windows[0].counted) < sum(both.held_out.windows[0].counted)


@pytest.mark.parametrize("command", ["eval", "routes", "tune"])
def test_unknown_roles_are_refused(out, chats, command, monkeypatch, capsys):
    given = ["--file", chats] if command == "routes" else ["--data", f"fox={chats}"]
    monkeypatch.setattr(sys, "argv", ["moemerge", command, str(out), *given, "--chat-roles", "user, bot"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert (
        "--chat-roles: 'bot' is not a role; known: system, developer, user, assistant, tool." in capsys.readouterr().err
    )


def test_the_command_line_takes_roles(out, chats, monkeypatch, capsys):
    words = ["routes", out, "--file", chats, "--chat-roles", "assistant", "--json", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["moemerge", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    first = json.loads(capsys.readouterr().out)["texts"][0]
    assert first["name"] == "chats.jsonl:1"
    assert "".join(first["tokens"]) == " ".join(WORDS[3:9])
