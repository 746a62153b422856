"""Data sets on the Hub: `datasets` itself against a Hub on this machine, each program in its own process."""

import io
import json
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from moemerge.errors import RefusedError
from moemerge.sources import data_sets
from moemerge.sources.data_sets import HubData, parse_hub_data
from tests.support.hub_world import World
from tests.support.machine import Machine
from tests.support.models import TEXT

READ = """
import json, sys
from moemerge.errors import MoemergeError
from moemerge.texts.documents import find_files, read_documents

for reference in sys.argv[1:]:
    try:
        print(json.dumps([str(one) for one in read_documents(find_files([reference], "x"))]))
    except MoemergeError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""
LINES = [line + " and so on" for line in TEXT.split("\n")]
CHAT = "Chat(messages=(Message(role='user', content='Hi'), Message(role='assistant', content='Hello')))"


def as_parquet(*rows: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


def as_lines(*rows: dict[str, Any]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@pytest.fixture
def data(world: World) -> World:
    said = {"turns": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "score": 1}
    world.hub.add("acme/talk", {"data/train-00000-of-00001.parquet": as_parquet(said, said)})
    texts = {
        "README.md": b"---\nconfigs:\n- {config_name: small, data_files: small.jsonl}\n- {config_name: all, data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]}\n---\n",
        "small.jsonl": as_lines({"text": "small"}),
        "train.jsonl": as_lines(*[{"text": f"line {number}"} for number in range(2100)]),
        "test.jsonl": as_lines({"text": "held out"}),
    }
    world.hub.add("acme/texts", texts)
    return world


def read(machine: Machine, *references: str, **environment: str) -> list[list[str]]:
    done = machine.python("-c", READ, *references, **environment)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_data_sets_are_read_by_split_subset_and_column(data: World, machine: Machine) -> None:
    named = "hf://datasets/acme"
    talk, all_, small, test, *wrong = read(
        machine,
        f"{named}/talk#turns",
        f"{named}/texts/all",
        f"{named}/texts/small:train#text",
        f"{named}/texts@main/all:test#text",
        f"{named}/talk",
        f"{named}/talk#words",
        f"{named}/texts/all:validation",
        f"{named}/talk#score",
        f"{named}/texts@v9/all",
        f"{named}/nothing",
    )
    assert talk == [CHAT, CHAT]
    assert all_ == [f"line {number}" for number in range(2000)]
    assert small == ["small"]
    assert test == ["held out"]
    forms = "text, messages, conversations, prompt and completion, instruction and output"
    assert wrong == [
        ["RefusedError", f"{named}/talk, row 1: expected a text, or an object with {forms}; found turns, score."],
        ["RefusedError", f"{named}/talk#words: has no column 'words'; it has turns, score."],
        [
            "RefusedError",
            f"{named}/texts/all:validation: cannot be read: Bad split: validation. Available splits: ['train', 'test'].",
        ],
        ["RefusedError", f"{named}/talk#score, row 1: expected a text, or an object with {forms}; found 1."],
        ["SourceError", f"{named}/texts@v9/all: the data set has no revision 'v9'."],
        [
            "SourceError",
            f"{named}/nothing: there is no such data set on the Hub, or it is private. Check the name; for a private one "
            "log in with `hf auth login`.",
        ],
    ]


def test_without_a_network_the_message_says_so(data: World, machine: Machine) -> None:
    (found,) = read(machine, "hf://datasets/acme/talk", HF_HUB_OFFLINE="1")
    assert found == [
        "SourceError",
        "hf://datasets/acme/talk: the Hub cannot be reached. Check the network and HF_HUB_OFFLINE, or name files on this "
        "machine.",
    ]


def test_a_merge_and_an_evaluation_say_which_commit_they_read(data: World, machine: Machine) -> None:
    for number, name in enumerate(("fox", "code", "chat")):
        rows = as_lines(*[{"text": f"{LINES[number % len(LINES)]} {turn}"} for turn in range(8)])
        data.hub.add(f"acme/for-{name}", {"train.jsonl": rows})
    config = {
        "base_model": str(data.folder / "base"),
        "experts": [
            {"source_model": str(data.folder / name), "positive_texts": f"hf://datasets/acme/for-{name}"}
            for name in ("fox", "code", "chat")
        ],
    }
    (machine.folder / "merge.yaml").write_text(yaml.safe_dump(config))
    merged, judged = machine.session(
        ["merge.yaml", "out"],
        ["eval", "out", "--data", "fox=hf://datasets/acme/for-fox", "--update-card", "--quiet"],
    )
    assert (merged.code, judged.code) == (0, 0), (merged.err, judged.err)
    card = (machine.folder / "out" / "README.md").read_text()
    commits = {name: data.hub.repositories[f"acme/for-{name}"].commit("main").hash for name in ("fox", "code", "chat")}
    named = ", ".join(f"`acme/for-{name} at {commit}`" for name, commit in commits.items())
    assert f"The routers were made from data sets on the Hub: {named}." in card
    assert f"> **Note:** fox is text of acme/for-fox at {commits['fox']}." in card
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["acme/for-fox", "acme/for-code", "acme/for-chat"]
    # The plan and the routers read each once.
    assert data.hub.sent_bytes("acme/for-code", suffix="train.jsonl") < 3 * len(rows)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hf://datasets/a/b", ("a/b", None, None, "train", None)),
        ("hf://datasets/a/b@v1:test[:10%]#text", ("a/b", "v1", None, "test[:10%]", "text")),
        ("hf://datasets/a/b@refs/pr/1", ("a/b", "refs/pr", "1", "train", None)),
        ("hf://datasets/a/b/sub:all#a column", ("a/b", None, "sub", "all", "a column")),
    ],
)
def test_references_are_taken_apart(text, found):
    assert parse_hub_data(text, "x") == HubData(text, *found)


@pytest.mark.parametrize("text", ["hf://a/b", "hf://datasets/a", "hf://datasets/a/b/c/d", "hf://datasets/a/b:"])
def test_references_of_another_form_are_refused(text):
    with pytest.raises(RefusedError) as caught:
        parse_hub_data(text, "experts[0].positive_texts[0]")
    assert str(caught.value) == (
        "experts[0].positive_texts[0]: expected hf://datasets/user/name[@revision][/subset][:split][#column], found "
        f"{text!r}."
    )


def test_without_datasets_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(data_sets, "find_spec", lambda _name: None)
    with pytest.raises(RefusedError) as caught:
        parse_hub_data("hf://datasets/a/b", "--data code[0]")
    assert str(caught.value) == ("--data code[0]: to read hf://datasets/a/b, datasets is needed: pip install datasets.")
