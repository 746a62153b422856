"""Four models in folders here and on a Hub beside it, for tests of merges from there."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from moemerge import load_config, merge, plan_merge
from moemerge.planning.options import PlanOptions
from tests.support.hub_server import Files, Hub
from tests.support.machine import SINGLE, Machine, Result
from tests.support.models import make_model, write_config

MODELS = {"base": "apache-2.0", "fox": "mit", "code": "apache-2.0", "chat": "mit"}
"""Their licences, by name."""


@dataclass(frozen=True)
class World:
    """Four models, in folders here and as `acme/NAME` on a Hub."""

    folder: Path
    hub: Hub
    url: str

    def config(self, machine: Machine, **keys: Any) -> str:
        base, *experts = (f"acme/{name}" for name in MODELS)
        path = write_config(machine.folder / "merge.yaml", base, experts, **keys)
        return str(path)

    def merged_from_folders(self, machine: Machine, max_shard_bytes: int = 10**9, **keys: Any) -> Path:
        """The same merge of the same models, all on this machine and in this process."""
        config = Path(self.config(machine, **keys))
        document = yaml.safe_load(config.read_text().replace("acme/", f"{self.folder}/"))
        (machine.folder / "local.yaml").write_text(yaml.safe_dump(document))
        plan = plan_merge(load_config(machine.folder / "local.yaml"), PlanOptions(max_shard_bytes=max_shard_bytes))
        merge(plan, machine.folder / "local")
        return machine.folder / "local"


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, hub = tmp_path_factory.mktemp("models"), Hub()
    base = load_file(make_model(folder / "base") / SINGLE)
    for seed, name in enumerate(MODELS):
        weights = load_file(make_model(folder / name, seed) / SINGLE)
        # Near to the base, as fine-tunes are.
        mixed = {key: 0.95 * base[key] + 0.05 * weights[key] for key in weights}
        save_file(mixed, folder / name / SINGLE, {"format": "pt"})
        (folder / name / "README.md").write_text(f"---\nlicense: {MODELS[name]}\n---\n# {name}\n")
        hub.add(f"acme/{name}", files_of(folder / name))
    with hub.running() as url:
        yield World(folder, hub, url)


@pytest.fixture
def machine(world: World, tmp_path: Path) -> Iterator[Machine]:
    yield Machine(tmp_path, world.url)
    world.hub.forget_faults()
    world.hub.reset()


def weights_sent(hub: Hub) -> int:
    return hub.sent_bytes(suffix=".safetensors")


def lines(result: Result) -> list[str]:
    """What was said beside the progress."""
    return [line for line in result.err.splitlines() if not line.startswith(("weights: ", "note: "))]


def planned(machine: Machine, config: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(machine.moemerge("plan", config, "--json", "--quiet").out)
    return plan


def assert_nothing_is_left(machine: Machine) -> None:
    assert {path.name for path in machine.folder.iterdir()} <= {"cache", "home", "merge.yaml"}
