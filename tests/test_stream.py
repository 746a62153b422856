"""Weights that stay on the Hub, read by byte ranges: what is fetched, and what happens when the network fails."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.hub_server import Files, Hub
from tests.models import make_model, write_config
from tests.test_hub import SINGLE, Machine

MODELS = ("base", "fox", "code", "chat")
WAYS = {
    "ridge": {"gate_mode": "ridge"},
    "cheap_embed": {"gate_mode": "cheap_embed"},
    "delta": {"gate_mode": "delta", "prompts": False},
    "random": {"gate_mode": "random"},
    "float16": {"gate_mode": "random", "dtype": "float16"},
}


@dataclass(frozen=True)
class World:
    """Four models, in folders here and as `acme/NAME` on a Hub."""

    folder: Path
    hub: Hub
    url: str

    def config(self, machine: Machine, **keys: object) -> str:
        base, *experts = (f"acme/{name}" for name in MODELS)
        path = write_config(machine.folder / "merge.yaml", base, experts, **keys)
        return str(path)

    def merged_from_folders(self, machine: Machine, **keys: object) -> Path:
        """The same merge of the same models, all on this machine."""
        config = Path(self.config(machine, **keys))
        document = yaml.safe_load(config.read_text().replace("acme/", f"{self.folder}/"))
        (machine.folder / "local.yaml").write_text(yaml.safe_dump(document))
        assert machine.moemerge("local.yaml", "local", "--quiet").code == 0
        return machine.folder / "local"


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, hub = tmp_path_factory.mktemp("models"), Hub()
    base = load_file(make_model(folder / "base") / SINGLE)
    for seed, name in enumerate(MODELS):
        weights = load_file(make_model(folder / name, seed) / SINGLE)
        # Near to the base, as fine-tunes are.
        mixed = {key: 0.95 * base[key] + 0.05 * weights[key] for key in weights}
        save_file(mixed, folder / name / SINGLE, {"format": "pt"})
        hub.add(f"acme/{name}", files_of(folder / name))
    with hub.running() as url:
        yield World(folder, hub, url)


@pytest.fixture
def machine(world, tmp_path):
    world.hub.requests.clear()
    return Machine(tmp_path, world.url)


@pytest.mark.parametrize("way", WAYS)
def test_streamed_bytes_are_those_of_a_merge_from_the_disk(world, machine, way):
    config = world.config(machine, **WAYS[way])
    streamed = machine.moemerge(config, "streamed", "--stream", "--quiet")
    assert (streamed.code, streamed.err) == (0, "")
    local = world.merged_from_folders(machine, **WAYS[way])
    assert (machine.folder / "streamed" / "model.safetensors").read_bytes() == (
        local / "model.safetensors"
    ).read_bytes()
    assert not list(machine.cache.rglob("*.safetensors"))
    assert sorted(path.name for path in machine.folder.iterdir()) == [
        "cache",
        "local",
        "local.yaml",
        "merge.yaml",
        "streamed",
    ]
