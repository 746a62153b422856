"""`moemerge analyze` of mixtures on the Hub."""

import json

from tests.support.hub_world import files_of, machine, weights_sent, world  # noqa: F401  fixtures


def test_weights_are_read_by_ranges_and_text_needs_the_model_here(world, machine):  # noqa: F811
    local = world.merged_from_folders(machine, prompts=False)
    world.hub.add("acme/mixture", files_of(local))
    (machine.folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    nbytes = sum(path.stat().st_size for path in local.glob("*.safetensors"))
    for options in ([], ["--data", "fox=fox.txt", "--device", "cpu"]):
        world.hub.reset()
        found, expected = (
            machine.moemerge("analyze", model, *options, "--json", "--quiet") for model in ("acme/mixture", str(local))
        )
        assert (found.code, found.err) == (0, "")
        # The commands in its sentences name the model as it was named.
        assert json.loads(found.out.replace("acme/mixture", "M")) == json.loads(expected.out.replace(str(local), "M"))
        assert bool(list(machine.cache.rglob("*.safetensors"))) == bool(options)
        assert weights_sent(world.hub) < 2 * nbytes
