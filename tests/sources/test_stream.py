"""Weights that stay on the Hub, read by byte ranges: what is fetched, and what happens when the network fails."""

import json
import pickle
import re
import shutil
import signal
import sys
import time
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load, load_file

from moemerge.checkpoint.files import read_exactly
from moemerge.checkpoint.jobs import CONNECTIONS
from moemerge.errors import OutputError, SourceError
from moemerge.sources import ranges
from moemerge.sources.ranges import HubFile, NoRangesError
from moemerge.sources.reference import Reference
from tests.support.hub_server import Files, Hub, User
from tests.support.hub_world import MODELS, World, assert_nothing_is_left, files_of, lines, planned, weights_sent
from tests.support.machine import SINGLE, Machine, Result
from tests.support.models import SIZES, make_model, write_config

WAYS = {
    "ridge": {"gate_mode": "ridge"},
    "cheap_embed": {"gate_mode": "cheap_embed"},
    "delta": {"gate_mode": "delta", "prompts": False},
    "random": {"gate_mode": "random"},
    "float16": {"gate_mode": "random", "dtype": "float16"},
}


def header_bytes(hub: Hub, repo: str) -> int:
    """Of a model's file, its header with the 8 bytes that say how long that is."""
    content = hub.repositories[repo].find("main")[1][SINGLE]
    return 8 + int.from_bytes(content[:8], "little")


def weight_files(folder: Path) -> Files:
    """A mixture's shards, that of the routers too, and their index."""
    return {name: content for name, content in files_of(folder).items() if name.startswith("model")}


@pytest.mark.parametrize(
    "way",
    # The tests below merge with random routers.
    [pytest.param(way, marks=pytest.mark.slow if way in {"random", "cheap_embed", "float16"} else ()) for way in WAYS],
)
def test_streamed_bytes_are_those_of_a_merge_from_the_disk_and_each_is_fetched_once(world, machine, way):
    config = world.config(machine, **WAYS[way])
    plan = planned(machine, config)
    headers = sum(header_bytes(world.hub, f"acme/{name}") for name in MODELS)
    assert weights_sent(world.hub) == headers + plan["compared_bytes"]
    world.hub.reset()
    streamed = machine.moemerge(config, "streamed", "--stream", "--quiet")
    assert (streamed.code, streamed.err) == (0, "")
    assert weights_sent(world.hub) == headers + plan["compared_bytes"] + plan["download_bytes"]
    assert (
        plan["download_bytes"]
        < plan["remote_bytes"]
        == sum((world.folder / name / SINGLE).stat().st_size for name in MODELS)
    )
    local = world.merged_from_folders(machine, **WAYS[way])
    assert weight_files(machine.folder / "streamed") == weight_files(local)
    assert not list(machine.cache.rglob("*.safetensors"))
    shutil.rmtree(machine.folder / "streamed")
    shutil.rmtree(local)
    (machine.folder / "local.yaml").unlink()
    assert_nothing_is_left(machine)


def test_what_is_needed_of_each_model_is_what_the_merge_is_made_of(world, machine):
    config = world.config(machine, **WAYS["random"])
    plan = planned(machine, config)
    assert plan["kept_bytes"] == 0
    assert plan["download_bytes"] == plan["output_bytes"] - sum(
        [
            sum(shard["bytes"] for shard in plan["shards"]) - tensor_bytes(plan),
            sum((world.folder / "base" / name).stat().st_size for name in plan["copied_files"]),
            router_bytes(plan),
        ]
    )
    kept = planned(machine, world.config(machine, **WAYS["ridge"]))
    # The base's FFNs are read for the routers alone, but for the last one, which is not run.
    ffn = 4 * 3 * SIZES["intermediate_size"] * SIZES["hidden_size"]
    assert kept["download_bytes"] == plan["download_bytes"] + (SIZES["num_hidden_layers"] - 1) * ffn
    assert 0 < kept["kept_bytes"] < kept["download_bytes"]


def tensor_bytes(plan: dict[str, Any]) -> int:
    return sum(4 * prod(tensor["shape"]) for tensor in plan["tensors"])


def router_bytes(plan: dict[str, Any]) -> int:
    return sum(4 * prod(tensor["shape"]) for tensor in plan["tensors"] if tensor["from"] == "router")


def merged(world: World, machine: Machine, *options: str) -> Result:
    return machine.moemerge(world.config(machine, **WAYS["random"]), "out", "--stream", *options)


def merged_in_a_hurry(world: World, machine: Machine) -> Result:
    return machine.in_a_hurry(world.config(machine, **WAYS["random"]), "out", "--stream")


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory) -> Files:
    """The files of weights of the merge with random routers."""
    machine = Machine(tmp_path_factory.mktemp("expected"), world.url)
    return weight_files(world.merged_from_folders(machine, **WAYS["random"]))


def test_ranges_share_a_few_connections(world, machine):
    assert merged(world, machine).code == 0
    requests = [call for call in world.hub.calls if call.host == "cdn"]
    # One for each thread that copies, and where a client's session is a thread's own, one for each model's header.
    assert world.hub.connections["cdn"] <= CONNECTIONS + len(MODELS) < len(requests) / 2


def test_what_breaks_off_goes_on_where_it_was(world, machine, expected):
    world.hub.break_off(f"*/{SINGLE}", 12, after=700)
    result = merged_in_a_hurry(world, machine)
    assert (result.code, lines(result)[8:]) == (0, [])
    assert weight_files(machine.folder / "out") == expected
    for name in MODELS:
        ranges = world.hub.ranges(f"acme/{name}", SINGLE)
        assert len(ranges) == len(set(ranges))  # none is asked for again from its start


def test_a_body_that_is_too_short_goes_on_where_it_ended(world, machine, expected):
    world.hub.misanswer(f"*/{SINGLE}", "short", 6)
    assert merged_in_a_hurry(world, machine).code == 0
    assert weight_files(machine.folder / "out") == expected


def test_other_bytes_than_were_asked_for_are_an_error(world, machine):
    world.hub.misanswer(f"*/{SINGLE}", "shifted", 100)
    result = merged(world, machine)
    assert result.code == 1
    assert re.fullmatch(
        rf"error: acme/\w+@\w{{7}}/{SINGLE}: bytes \d+ to \d+ were asked for, \d+ to \d+ were sent.", lines(result)[-1]
    )
    assert_nothing_is_left(machine)


def test_where_no_ranges_are_sent_all_is_downloaded(world, machine, expected):
    world.hub.misanswer(f"*/{SINGLE}", "whole", 1000)
    result = merged(world, machine)
    assert result.code == 0, result.err
    told = [line for line in lines(result) if "sends no byte ranges (status 200). All of it is downloaded." in line]
    assert len(told) == len(MODELS)
    assert len(list(machine.cache.rglob(SINGLE))) == len(MODELS)
    assert weight_files(machine.folder / "out") == expected


def test_a_model_that_becomes_several_experts_is_fetched_once(world, machine):
    config = write_config(machine.folder / "merge.yaml", "acme/base", ["acme/fox"] * 3, prompts=False)
    plan = json.loads(machine.moemerge("plan", str(config), "--allow-identical-experts", "--json", "-q").out)
    world.hub.reset()
    assert machine.moemerge(str(config), "out", "--stream", "--allow-identical-experts").code == 0
    headers = sum(header_bytes(world.hub, f"acme/{name}") for name in ("base", "fox"))
    sent = weights_sent(world.hub) - plan["compared_bytes"]
    assert sent == headers + plan["download_bytes"] < 2 * (world.folder / "fox" / SINGLE).stat().st_size


def test_a_hub_that_stumbles_while_headers_are_read_is_asked_again(world, machine):
    world.hub.fail("/api/models/acme/fox/revision/*", 503)
    world.hub.fail(f"/acme/code/resolve/*/{SINGLE}", 500)
    config = world.config(machine, **WAYS["random"])
    assert machine.moemerge("plan", config).code == 0


def test_a_busy_hub_is_asked_again_and_waited_for_as_it_says(world, machine, expected):
    world.hub.limit_rate("/api/models/acme/base/revision/*", 1)
    world.hub.limit_rate(f"/acme/fox/*/{SINGLE}", 1, method="GET")
    world.hub.fail(f"/acme/code/*/{SINGLE}", 503, 2, method="GET")
    world.hub.fail(f"/acme/chat/resolve/*/{SINGLE}", 429, RateLimit='"api";r=0;t=1')
    result = merged(world, machine)
    assert result.code == 0, result.err
    said = [line for line in lines(result) if "asks to wait" in line]
    assert [re.sub("@.{7}", "@COMMIT", line) for line in sorted(said)] == [
        "acme/base: the Hub asks to wait for 1 s (too many requests)",
        f"acme/chat@COMMIT/{SINGLE}: the Hub asks to wait for 1 s (too many requests)",
        f"acme/fox@COMMIT/{SINGLE}: the Hub asks to wait for 1 s (too many requests)",
    ]
    assert weight_files(machine.folder / "out") == expected


def test_addresses_that_expire_are_asked_for_again(world, machine, expected):
    world.hub.before(f"*/{SINGLE}", world.hub.expire_locations, 3, method="GET")
    assert merged(world, machine).code == 0
    assert weight_files(machine.folder / "out") == expected


def change_meanwhile(world, change):
    """Change `acme/fox` when its headers have been read, which takes two requests."""
    address = f"/acme/fox/*/{SINGLE}"

    def change_and_expire() -> None:
        change()
        world.hub.expire_locations()

    world.hub.before(address, lambda: world.hub.before(address, change_and_expire, method="GET"), 2, method="GET")


def files_of_another(folder):
    other = files_of(make_model(folder / "other", 9))
    shutil.rmtree(folder / "other")
    return other


def test_a_repository_that_changes_meanwhile_is_an_error_and_not_a_mixture(world, machine, tmp_path):
    other, original = files_of_another(tmp_path), files_of(world.folder / "fox")
    change_meanwhile(world, lambda: world.hub.rewrite("acme/fox", other))
    try:
        result = merged(world, machine)
    finally:
        world.hub.rewrite("acme/fox", original)
    assert result.code == 1
    assert re.sub("@.{7}", "@COMMIT", lines(result)[-1]) == (
        f"error: acme/fox@COMMIT/{SINGLE}: the repository was changed while it was read: it is no longer there. Run it "
        "again, which starts from the new commit, or name a revision that stays."
    )
    assert_nothing_is_left(machine)


def test_another_content_under_the_same_commit_is_an_error(world, machine, tmp_path):
    other, original = files_of_another(tmp_path)[SINGLE], files_of(world.folder / "fox")[SINGLE]
    change_meanwhile(world, lambda: world.hub.replace("acme/fox", SINGLE, other))
    try:
        result = merged(world, machine)
    finally:
        world.hub.replace("acme/fox", SINGLE, original)
    assert result.code == 1
    assert "the repository was changed while it was read: it has other content now." in lines(result)[-1]
    assert_nothing_is_left(machine)


def test_the_token_goes_to_the_hub_alone(world, machine):
    world.hub.users["hf_reader"] = User("reader", role="read")
    config = world.config(machine, **WAYS["ridge"])
    result = machine.moemerge(config, "out", "--stream", "--debug", HF_TOKEN="hf_reader")
    assert result.code == 0, result.err
    assert {call.host for call in world.hub.calls if call.has_token} == {"hub"}
    assert {call.host for call in world.hub.calls} == {"hub", "cdn"}
    assert "hf_reader" not in result.out + result.err
    for path in (machine.folder / "out").iterdir():
        assert b"hf_reader" not in path.read_bytes(), path


def test_where_the_disk_has_no_room_weights_are_streamed(world, machine):
    """The disk is made small in the program's own eyes: a real one of some kilobytes cannot be had everywhere."""
    config = world.config(machine, **WAYS["random"])
    small = """
import shutil, sys
real = shutil.disk_usage
shutil.disk_usage = lambda path: real(path)._replace(free=400_000)
from moemerge.cli import main
main()
"""
    result = machine.python("-c", small, config, "out")
    assert result.code == 0, result.err
    plan = planned(machine, config)
    needed = plan["remote_bytes"] + tensor_bytes(plan)
    assert (
        f"the disk of the Hub's cache has 0.00 GB free, and {needed / 1e9:.2f} GB would be needed: weights are streamed "
        "from the Hub, as with --stream"
    ) in lines(result)
    assert not list(machine.cache.rglob("*.safetensors"))


def test_an_inspection_and_a_verification_leave_nothing_in_the_cache(world, machine):
    found = machine.moemerge("inspect", "acme/fox", "--json")
    assert json.loads(found.out)["files"] == {SINGLE: (world.folder / "fox" / SINGLE).stat().st_size}
    assert weights_sent(world.hub) == header_bytes(world.hub, "acme/fox")
    looked = machine.moemerge("inspect", "acme/fox", "--values", "--json")
    assert (looked.code, json.loads(looked.out)["values"]["not_finite"]) == (0, [])
    assert merged(world, machine).code == 0
    config = str(machine.folder / "merge.yaml")
    assert machine.moemerge("verify", "out", "--against", config).code == 0
    with (machine.folder / "out" / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-30_000, 2)
        file.write(b"!")
    assert machine.moemerge("verify", "out", "--against", config).code == 1
    assert not list(machine.cache.rglob("*.safetensors"))


def test_pickles_cannot_be_streamed_and_are_downloaded(world, machine):
    folder = machine.folder / "pickled"
    make_model(folder, 5)
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    world.hub.add("acme/pickled", files_of(folder))
    shutil.rmtree(folder)
    config = write_config(machine.folder / "merge.yaml", "acme/base", ["acme/pickled", "acme/fox"], prompts=False)
    result = machine.moemerge(str(config), "out", "--stream")
    assert result.code == 0, result.err
    assert "acme/pickled: downloading pytorch_model.bin" in lines(result)
    assert [path.name for path in machine.cache.rglob("*.bin")] == ["pytorch_model.bin"]


def test_a_streamed_merge_that_was_cut_off_goes_on(world, machine, expected):
    config = world.config(machine, **WAYS["random"])
    options = ("--stream", "--max-shard-size", "60kB")
    asked = iter(range(100))

    def refuse_the_eighth() -> None:
        if next(asked) == 7 + 9:  # behind the rows of 3 layers by which the plan compares it with the base
            world.hub.fail(f"/acme/chat/*/{SINGLE}", 404, 100, host="cdn")

    world.hub.before(f"/acme/chat/*/{SINGLE}", refuse_the_eighth, 100, method="GET")
    first = machine.moemerge(config, "out", *options)
    assert first.code == 1
    assert "complete shards are kept beside out: --resume continues" in first.err
    world.hub.forget_faults()
    before = weights_sent(world.hub)
    world.hub.reset()
    again = machine.moemerge(config, "out", *options, "--resume", "--quiet")
    assert (again.code, again.err) == (0, "")
    sent = weights_sent(world.hub)
    plan = planned(machine, config)
    assert sent - plan["compared_bytes"] < plan["download_bytes"] < before + sent - 2 * plan["compared_bytes"]
    stored = {}
    for path in (machine.folder / "out").glob("*.safetensors"):
        stored |= load_file(path)
    shards = [content for name, content in expected.items() if name.endswith(".safetensors")]
    reference = {name: tensor for content in shards for name, tensor in load(content).items()}
    assert stored.keys() == reference.keys()
    assert all(torch.equal(stored[name], reference[name]) for name in reference)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_does_not_wait_for_the_hub(world, machine):
    world.hub.before(
        f"/acme/fox/*/{SINGLE}",
        lambda: world.hub.limit_rate(f"/acme/*/{SINGLE}", 300, 100, method="GET"),
        3,
        method="GET",
    )
    config = world.config(machine, **WAYS["random"])
    with machine.start("-m", "moemerge", config, "out", "--stream") as child:
        for line in child.stderr:
            if "asks to wait for 300 s" in line:
                break
        started = time.monotonic()
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert child.returncode == 130
    assert time.monotonic() - started < 30
    assert_nothing_is_left(machine)


def test_a_file_on_the_hub_itself_is_read_with_the_token(tmp_path, monkeypatch):
    """The Hub keeps small files beside the code, and sends nobody elsewhere for them."""
    hub = Hub()
    hub.users = {"hf_alice": User("alice")}
    hub.add("alice/tiny", {"config.json": b"0123456789"}, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    with hub.running() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for module in (constants, file_download):  # older clients have a name of their own for it
            template = url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        file = HubFile(
            Reference("alice/tiny", None), hub.repositories["alice/tiny"].find("main")[0], "config.json", print
        )
        with file.open(3, 4) as reader:
            assert read_exactly(reader, 4) == b"3456"
        # Another process has a file of its own, which asks the Hub itself.
        file.keep(tmp_path, 3, 4)
        with pickle.loads(pickle.dumps(file)).open(3, 4) as reader:  # noqa: S301  its own
            assert read_exactly(reader, 4) == b"3456"
        assert not list(tmp_path.iterdir())
        # A disk that is full, or a folder that is gone, is said of the folder where it is kept.
        file.keep(tmp_path / "gone" / "kept", 0, 10)
        with pytest.raises(
            OutputError, match=r"gone/alice--tiny--.*--config.json: cannot be written: No such file or directory\.$"
        ):
            file.open(0, 10)
    wrong = SimpleNamespace(status_code=206, headers={"Content-Range": "bytes 3-6/11"})
    changed = f"{file}: the repository was changed while it was read: {{}}. Run it again, which starts from the new commit, or name a revision that stays."
    for headers, message in (
        ({"Content-Range": "bytes 3-6/11"}, changed.format("it had 10 bytes and has 11")),
        ({"Content-Range": "bytes 3-6/10", "ETag": "1"}, None),
        ({"Content-Range": "bytes 3-6/10", "ETag": "2"}, changed.format("it has other content now")),
    ):
        wrong.headers = headers
        if message is None:
            file.check_answer("http://cdn/x", wrong, 3, 7)
            continue
        with pytest.raises(SourceError) as caught:
            file.check_answer("http://cdn/x", wrong, 3, 7)
        assert str(caught.value) == message
    assert file.explain(caught.value) is caught.value
    assert str(file.refused("http://cdn/x", 403)) == (
        f"{file}: cdn, where the Hub sends us for the bytes, refuses them (status 403). Check what stands between you "
        "and it: a proxy, a firewall, the clock."
    )


def test_a_file_without_size_or_hash_is_not_streamed(monkeypatch):
    monkeypatch.setattr(ranges, "get_hf_file_metadata", lambda _: SimpleNamespace(size=None, etag="a", location="x"))
    told = r"^alice/tiny@c0ffee0/config.json: the Hub tells neither size nor hash of it, so it cannot be streamed\.$"
    with pytest.raises(NoRangesError, match=told):
        HubFile(Reference("alice/tiny", None), "c0ffee0", "config.json", print)
