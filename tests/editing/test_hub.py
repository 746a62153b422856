"""Edits of mixtures on the Hub: what is fetched of them."""

import json

import yaml

from tests.support.hub_world import files_of, machine, weights_sent, world  # noqa: F401  fixtures


def test_of_a_mixture_on_the_hub_only_what_is_kept_is_fetched(world, machine):  # noqa: F811
    local = world.merged_from_folders(machine, prompts=False)
    world.hub.add("acme/mixture", files_of(local))
    flags = ("--drop", "fox", "--quiet")
    shown = machine.moemerge("edit", "acme/mixture", "out", *flags, "--dry-run", "--json")
    assert (shown.code, shown.err) == (0, "")
    planned, headers = json.loads(shown.out), weights_sent(world.hub)
    assert headers < 100_000
    assert planned["download_bytes"] < sum(path.stat().st_size for path in local.glob("*.safetensors"))
    world.hub.reset()
    done = machine.moemerge("edit", "acme/mixture", "out", *flags)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert weights_sent(world.hub) == headers + planned["download_bytes"]
    assert not list(machine.cache.rglob("*.safetensors"))
    assert machine.moemerge("edit", str(local), "by hand", *flags).code == 0
    for name in ("config.json", "tokenizer.json", *(path.name for path in (machine.folder / "by hand").glob("model*"))):
        assert (machine.folder / "out" / name).read_bytes() == (machine.folder / "by hand" / name).read_bytes()
    verified = machine.moemerge("verify", "out", "--quiet")
    assert (verified.code, verified.err) == (0, "")


def test_a_mixture_on_the_hub_is_looked_up_once_for_all_its_experts(world, machine):  # noqa: F811
    """Its headers are read once too, by an edit of a command line and by one of a config."""
    world.hub.add("acme/mixture", files_of(world.merged_from_folders(machine, prompts=False)))
    shown = machine.moemerge("edit", "acme/mixture", "out", "--drop", "fox", "--dry-run")
    assert shown.code == 0
    assert shown.err.count("acme/mixture: looking it up on the Hub") == 1
    assert shown.err.count("acme/mixture: reading the headers of ") == 1
    (machine.folder / "edit.yaml").write_text(shown.out[: shown.out.index("\n\n")])
    world.hub.reset()
    planned = machine.moemerge("plan", "edit.yaml")
    assert planned.code == 0
    assert planned.err.count("acme/mixture: looking it up on the Hub") == 1
    assert planned.err.count("acme/mixture: reading the headers of ") == 1
    twice = world.hub.calls.copy()
    document = yaml.safe_load((machine.folder / "edit.yaml").read_text())
    document["experts"] += [entry | {"name": f"{entry['name']} again"} for entry in document["experts"]]
    (machine.folder / "edit.yaml").write_text(yaml.safe_dump(document))
    world.hub.reset()
    assert machine.moemerge("plan", "edit.yaml").code == 0
    assert len(world.hub.calls) == len(twice)
