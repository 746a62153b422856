"""`moemerge analyze` of mixtures on the Hub."""

import json

import pytest

from tests.support.hub_world import files_of, machine, weights_sent, world  # noqa: F401  fixtures


@pytest.mark.parametrize("has_text", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_are_read_by_ranges_and_text_needs_the_model_here(world, machine, has_text):  # noqa: F811
    local = world.merged_from_folders(machine, prompts=False)
    world.hub.add("acme/mixture", files_of(local))
    (machine.folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    nbytes = sum(path.stat().st_size for path in local.glob("*.safetensors"))
    options = ["--data", "fox=fox.txt", "--device", "cpu"] if has_text else []
    words = [["analyze", model, *options, "--json", "--quiet"] for model in ("acme/mixture", str(local))]
    found, expected = machine.session(*words)
    assert (found.code, found.err) == (0, "")
    # The commands in its sentences name the model as it was named.
    assert json.loads(found.out.replace("acme/mixture", "M")) == json.loads(expected.out.replace(str(local), "M"))
    assert bool(list(machine.cache.rglob("*.safetensors"))) == has_text
    assert weights_sent(world.hub) < 2 * nbytes
