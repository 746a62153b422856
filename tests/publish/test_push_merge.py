"""Merges that go to the Hub, whole or shard by shard: what is there in the end, and what an interruption costs."""

import json
import os
import re
import socket
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub import ModelCard, snapshot_download

from tests.sources.test_hub import INDEX
from tests.support.hub_server import User
from tests.support.hub_world import World, assert_nothing_is_left, lines, weights_sent
from tests.support.machine import ROOT, Machine
from tests.support.models import assert_close, load, load_weights, logits

TOKEN = {"HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
SHARDS = ("--max-shard-size", "60kB")
STREAM = ("--stream", "--push", "alice/mix", "--push-streaming", *SHARDS)


@pytest.fixture(autouse=True)
def users(world):
    world.hub.users = {"hf_alice": User("alice"), "hf_reader": User("alice", role="read")}
    yield
    for repo in [repo for repo in world.hub.repositories if repo.startswith("alice/")]:
        del world.hub.repositories[repo]


def local_shards(world: World, machine: Machine, **keys: object) -> dict[str, bytes]:
    """The weights of the same merge from folders, which is removed again."""
    merged = world.merged_from_folders(machine, max_shard_bytes=60_000, **keys)
    found = {path.name: path.read_bytes() for path in merged.glob("*.safetensors")}
    for path in merged.iterdir():
        path.unlink()
    merged.rmdir()
    (machine.folder / "local.yaml").unlink()
    return found


def pushed(world: World, repo: str = "alice/mix", revision: str = "main") -> dict[str, bytes]:
    return world.hub.repositories[repo].find(revision)[1]


def shards_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("mode", ["ridge", pytest.param("random", marks=pytest.mark.slow)])
def test_shards_go_to_the_hub_one_by_one_and_the_disk_holds_two(world, machine, tmp_path, mode):
    expected = local_shards(world, machine, gate_mode=mode)
    config = world.config(machine, gate_mode=mode)
    on_disk = []

    def look() -> None:
        stage = machine.folder / ".out.moemerge-partial"
        on_disk.append({path.name for path in stage.glob("*.safetensors")})

    world.hub.before("/api/models/alice/mix/commit/*", look, 100)
    result = machine.moemerge(config, "out", *STREAM, **TOKEN)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"{world.url}/alice/mix"
    assert shards_of(pushed(world)) == expected
    assert len(expected) > 4
    assert max(map(len, on_disk)) <= 2
    assert_nothing_is_left(machine)
    history = [*world.hub.repositories["alice/mix"].commit("main").history()]
    finished = [bool({"config.json", INDEX} & commit.blobs.keys()) for commit in history]
    assert finished == [True, *[False] * (len(history) - 1)]  # the newest comes first
    folder = Path(snapshot_download("alice/mix", endpoint=world.url, cache_dir=tmp_path / "read", token="hf_alice"))
    reference = world.merged_from_folders(machine, gate_mode=mode)
    assert_close(logits(load(folder)), logits(load(reference)))


STAND_IN = (
    "from tests.support.stand_in_ray import Ray; Ray([1000, 1000, 0, 1, 1000]).install(); "
    "from moemerge.cli import main; main()"
)


@pytest.mark.parametrize("cluster", ["stand-in", pytest.param("Ray", marks=pytest.mark.slow)])
def test_processes_send_shards_by_themselves_and_keep_none(world, machine, tmp_path, cluster):
    expected = local_shards(world, machine, gate_mode="random")
    config = world.config(machine, gate_mode="random")
    (tmp_path / "scratch").mkdir()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "TMPDIR": str(tmp_path / "scratch"), "RAY_TMPDIR": tempfile.gettempdir()}
    command = ["-c", STAND_IN] if cluster == "stand-in" else ["-m", "moemerge"]
    if cluster == "Ray":
        pytest.importorskip("ray")
    child = machine.start(*command, config, "out", *STREAM, "--ray", "local", "--workers", "2", **TOKEN, **environment)
    out, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    assert out.splitlines()[-1] == f"{world.url}/alice/mix"
    assert shards_of(pushed(world)) == expected
    assert not [*(tmp_path / "scratch").glob("moemerge-*")]
    (tmp_path / "scratch").rename(tmp_path / "cache" / "scratch")
    assert_nothing_is_left(machine)
    history = [*world.hub.repositories["alice/mix"].commit("main").history()]
    finished = [bool({"config.json", INDEX} & commit.blobs.keys()) for commit in history]
    assert finished == [True, *[False] * (len(history) - 1)]


def test_a_process_whose_token_the_hub_does_not_take_is_named(world, machine):
    config = world.config(machine, gate_mode="random")
    program = STAND_IN.replace("main()", "import moemerge.merging.shared_hub as hub; ") + (
        "check = hub.HubWorker.check; import os; "
        "hub.HubWorker.check = lambda self: (os.environ.update(HF_TOKEN='hf_reader'), check(self)); main()"
    )
    child = machine.start("-c", program, config, "out", *STREAM, "--ray", "local", "--workers", "1", **TOKEN)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 2, errors
    assert errors.splitlines()[-1] == (
        f"error: --ray: on {socket.gethostname()}: alice/mix: the token of alice may only read. Make one that may write "
        f"at {world.url}/settings/tokens, and log in with `hf auth login`, or set HF_TOKEN."
    )
    assert "alice/mix" not in world.hub.repositories


def test_the_card_names_licence_and_commits(world, machine):
    assert machine.moemerge(world.config(machine, gate_mode="random"), "out", *STREAM, **TOKEN).code == 0
    card = ModelCard(pushed(world)["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == [f"acme/{name}" for name in ("base", "fox", "code", "chat")]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert "# alice/mix" in card.text
    for name in ("base", "fox", "code", "chat"):
        commit, _ = world.hub.repositories[f"acme/{name}"].find("main")
        assert f"`acme/{name}` at `{commit}`" in card.text


def test_a_push_that_was_cut_off_sends_only_what_is_missing(world, machine):
    expected = local_shards(world, machine, gate_mode="random")
    config = world.config(machine, gate_mode="random")
    commits = iter(range(100))

    def fail_the_fourth() -> None:
        if next(commits) == 2:  # the next one is the fourth
            world.hub.fail("/api/models/alice/mix/commit/*", 500)

    world.hub.before("/api/models/alice/mix/commit/*", fail_the_fourth, 100)
    first = machine.moemerge(config, "out", *STREAM, **TOKEN)
    assert first.code == 1
    assert lines(first)[-2:] == [
        "3 complete shards are kept on the Hub: --resume continues from them, a run without it starts over.",
        "error: alice/mix: the Hub answered with status 500: Told to fail. Try again later.",
    ]
    there = shards_of(pushed(world))
    assert len(there) == 3
    world.hub.forget_faults()
    fetched = weights_sent(world.hub)
    world.hub.reset()
    second = machine.moemerge(config, "out", *STREAM, "--resume", **TOKEN)
    assert second.code == 0, second.err
    assert shards_of(pushed(world)) == expected
    # The fourth shard's object had arrived, and only its commit failed.
    sent = {name for name in expected if f"alice/mix: holds {name}" in lines(second)}
    assert sent == expected.keys() - there.keys()
    others = sorted(sent)[1:]
    large = sum(len(expected[name]) for name in others)
    assert large <= world.hub.received_bytes() < large + 20_000  # and the tokenizer
    assert weights_sent(world.hub) < sum(map(len, expected.values())) < fetched + weights_sent(world.hub)
    assert_nothing_is_left(machine)


def test_a_model_in_the_way_is_replaced_only_when_told_to(world, machine):
    config = world.config(machine, gate_mode="random")
    old = {"config.json": b"{}", "model.safetensors": b"old", "notes.txt": b"kept"}
    world.hub.add("alice/mix", old)
    refused = machine.moemerge(config, "out", *STREAM, **TOKEN)
    assert (refused.code, lines(refused)[-1]) == (
        2,
        "error: alice/mix: main holds a model already (config.json). Name another repository or --revision, or replace "
        "the model with --overwrite.",
    )
    assert pushed(world) == old
    assert machine.moemerge(config, "out", *STREAM, "--overwrite", **TOKEN).code == 0
    files = pushed(world)
    assert files["notes.txt"] == b"kept"
    assert "model.safetensors" not in files
    assert shards_of(files).keys() == set(json.loads(files[INDEX])["weight_map"].values())


@pytest.mark.parametrize("way", ["device", "lock", "resume"])
@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_repository_is_made_before_the_last_refusal(world, machine, way, stream):
    config = world.config(machine, gate_mode="ridge" if way == "device" else "random")
    to = STREAM if stream else ("--stream", "--push", "alice/mix", *SHARDS)
    more = {"device": ("--device", "cuda:77"), "lock": (), "resume": ("--resume",)}[way]
    stage = machine.folder / ".out.moemerge-partial"
    if way == "resume":
        stage.mkdir()
        (stage / "x.safetensors").write_bytes(b"x")
        stage.with_name(f"{stage.name}.journal").write_text('{"seed": 5}\n{"name": "x.safetensors"}\n')
    lock = FileLock(stage.with_name(f"{stage.name}.lock"))
    with lock if way == "lock" else nullcontext():
        result = machine.moemerge(config, "out", *to, *more, **TOKEN)
    assert result.code in {1, 2}
    assert {"device": "cuda:77", "lock": "another moemerge is writing", "resume": "--resume: the merge that was cut"}[
        way
    ] in result.err
    assert "alice/mix" not in world.hub.repositories


def test_no_branch_is_made_before_the_last_refusal(world, machine):
    config = world.config(machine, gate_mode="random")
    world.hub.add("alice/mix", {"config.json": b'{"model_type": "mixtral"}', "model.safetensors": b"old"})
    refused = machine.moemerge(config, "out", *STREAM, "--revision", "new", **TOKEN)
    assert (refused.code, lines(refused)[-1]) == (
        2,
        "error: alice/mix: main holds a model already (config.json). Name another repository or "
        "--revision, or replace the model with --overwrite.",
    )
    assert list(world.hub.repositories["alice/mix"].refs) == ["main"]


def test_nothing_is_removed_before_the_last_refusal(world, machine):
    config = world.config(machine, gate_mode="random")
    other = ("--stream", "--push", "alice/other", "--push-streaming", *SHARDS)
    commits = iter(range(100))

    def fail_the_fourth() -> None:
        if next(commits) == 2:  # the next one is the fourth
            world.hub.fail("/api/models/alice/other/commit/*", 500)

    world.hub.before("/api/models/alice/other/commit/*", fail_the_fourth, 100)
    assert machine.moemerge(config, "out", *other, **TOKEN).code == 1
    old = {"config.json": b"{}", "model.safetensors": b"old"}
    world.hub.add("alice/mix", old)
    refused = machine.moemerge(config, "out", *STREAM, "--overwrite", "--resume", "--seed", "7", **TOKEN)
    assert refused.code == 2
    assert lines(refused)[-1] == (
        "error: --resume: the merge that was cut off was not this one; what differs: destination, seed. Undo the change, "
        "or start over without --resume."
    )
    assert pushed(world) == old


def test_a_pull_request_that_was_cut_off_goes_on_under_the_name_that_was_told(world, machine):
    expected = local_shards(world, machine, gate_mode="random")
    config = world.config(machine, gate_mode="random")
    world.hub.add("alice/mix", {"README.md": b"# Mix"})
    commits = iter(range(100))

    def fail_the_fourth() -> None:
        if next(commits) == 2:  # the next one is the fourth
            world.hub.fail("/api/models/alice/mix/commit/*", 500)

    world.hub.before("/api/models/alice/mix/commit/*", fail_the_fourth, 100)
    first = machine.moemerge(config, "out", *STREAM, "--create-pr", **TOKEN)
    assert f"alice/mix: opened {world.url}/alice/mix/discussions/1; --revision refs/pr/1 continues it" in lines(first)
    there = shards_of(pushed(world, revision="refs/pr/1"))
    assert len(there) == 3
    again = machine.moemerge(config, "out", *STREAM, "--revision", "refs/pr/1", "--resume", **TOKEN)
    assert again.code == 0, again.err
    sent = {name for name in expected if f"alice/mix: holds {name}" in lines(again)}
    assert sent == expected.keys() - there.keys()
    assert shards_of(pushed(world, revision="refs/pr/1")) == expected
    assert pushed(world) == {"README.md": b"# Mix"}


def test_a_merge_is_pushed_when_it_is_complete(world, machine):
    config = world.config(machine, gate_mode="random")
    result = machine.moemerge(config, "out", "--push", "alice/mix", "--private", **TOKEN)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"{world.url}/alice/mix"
    assert re.search(r"^out: done, [\d.]+ kB in \d+ s$", result.out, re.MULTILINE)
    assert world.hub.repositories["alice/mix"].private
    local = {path.name: path.read_bytes() for path in (machine.folder / "out").iterdir()}
    assert {name: content for name, content in pushed(world).items() if name != ".gitattributes"} == local
    world.hub.reset()
    again = machine.moemerge("push", "out", "alice/mix", **TOKEN)
    assert (again.code, again.out) == (0, f"{world.url}/alice/mix\n")
    assert world.hub.received_bytes() == 0


def test_a_source_is_not_replaced_by_the_mixture_without_a_word(world, machine):
    config = world.config(machine, gate_mode="random")
    world.hub.add("alice/mix", dict(world.hub.repositories["acme/fox"].find("main")[1]))
    message = (
        "error: alice/mix: main holds a llama, and this is a mixtral. Name another repository or --revision, or replace "
        "the model with --overwrite."
    )
    refused = machine.moemerge(config, "out", "--push", "alice/mix", **TOKEN)
    assert (refused.code, lines(refused)[-1]) == (2, message)
    assert not (machine.folder / "out").exists()
    assert machine.moemerge(config, "out").code == 0
    refused = machine.moemerge("push", "out", "alice/mix", **TOKEN)
    assert (refused.code, lines(refused)[-1]) == (2, message)
    assert machine.moemerge("push", "out", "alice/mix", "--overwrite", **TOKEN).code == 0


def test_a_push_that_fails_leaves_the_model_and_says_how_to_go_on(world, machine):
    config = world.config(machine, gate_mode="random")
    world.hub.fail("/api/models/alice/mix/commit/*", 500)
    result = machine.moemerge(config, "out", "--push", "alice/mix", **TOKEN)
    assert result.code == 1
    assert result.err.splitlines()[-2:] == [
        "error: alice/mix: the Hub answered with status 500: Told to fail. Try again later.",
        "The model is complete in out: `moemerge push out alice/mix` sends what is missing.",
    ]
    assert load_weights(machine.folder / "out")
    assert machine.moemerge("push", "out", "alice/mix", **TOKEN).code == 0


REFUSALS = [
    (
        ("--push", "alice/mix"),
        {},
        1,
        "alice/mix: pushing needs a token of the Hub, and there is none. Log in with `hf auth login`, or set HF_TOKEN.",
    ),
    (
        ("--push", "bob/mix"),
        TOKEN,
        2,
        "bob/mix: alice may not write there. The token may write to alice/....",
    ),
    (("--push-streaming",), TOKEN, 2, "--push-streaming: says how to push, but not where to. Add --push user/repo."),
    (("--private",), TOKEN, 2, "--private: says how to push, but not where to. Add --push user/repo."),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=[" ".join(refusal[0]) for refusal in REFUSALS])
def test_what_the_hub_would_not_take_is_refused_before_any_weights_move(world, machine, refusal):
    options, environment, code, message = refusal
    result = machine.moemerge(world.config(machine, gate_mode="random"), "out", *options, **environment)
    assert (result.code, lines(result)[-1]) == (code, f"error: {message}")
    assert not list(machine.cache.rglob("*.safetensors"))
    assert_nothing_is_left(machine)


def test_sources_whose_licences_do_not_agree_need_a_word(world, machine):
    files = dict(world.hub.repositories["acme/fox"].find("main")[1])
    world.hub.add("acme/free", files | {"README.md": b"---\nlicense: gemma\n---\n"})
    world.hub.add("acme/bare", files | {"README.md": b"# A model"})
    config = world.config(machine, gate_mode="random")
    text = Path(config).read_text()
    Path(config).write_text(text.replace("acme/chat", "acme/bare").replace("acme/code", "acme/free"))
    result = machine.moemerge(config, "out", "--push", "alice/mix", **TOKEN)
    assert result.code == 2
    assert "acme/bare: none" in result.err
    assert not list(machine.cache.rglob("*.safetensors"))
    assert "alice/mix" not in world.hub.repositories
    named = machine.moemerge(config, "out", "--push", "alice/mix", "--license", "gemma", **TOKEN)
    assert named.code == 0, named.err
    assert ModelCard(pushed(world)["README.md"].decode()).data.license == "gemma"


def test_a_corrupted_upload_is_noticed_and_its_shard_kept(world, machine):
    config = world.config(machine, gate_mode="random")
    world.hub.corrupts_uploads = 1
    result = machine.moemerge(config, "out", *STREAM, **TOKEN)
    assert result.code == 1
    assert not {"config.json", INDEX} & pushed(world).keys()
    world.hub.forget_faults()
    again = machine.moemerge(config, "out", *STREAM, "--resume", **TOKEN)
    assert again.code == 0, again.err
    assert shards_of(pushed(world)) == local_shards(world, machine, gate_mode="random")
