"""Prompts that processes of a cluster share: their router inputs are those of one process."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from moemerge.checkpoint.files import Reader, open_range
from moemerge.errors import RouterError
from moemerge.routers.cluster_pass import capture_on_cluster
from moemerge.routers.pass_inputs import PassRequest
from moemerge.routers.streamed_pass import capture_router_inputs
from tests.passes.test_passes import request
from tests.support.models import load_weights, make_model, save_weights
from tests.support.stand_in_ray import Ray

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_model(tmp_path / "base", num_hidden_layers=5)


def prompts_of(folder: Path, **keys: object) -> PassRequest:
    """Prompts of several lengths, and some layers with routers."""
    asked = request(folder, (1, 2, 4))
    return replace(asked, prompts=tuple(replace(prompt, document=n) for n, prompt in enumerate(asked.prompts)), **keys)


@pytest.fixture
def ray(monkeypatch) -> Ray:
    monkeypatch.setitem(sys.modules, "ray", None)  # for the time of the test
    return Ray().install()


def shared(asked: PassRequest, workers: int) -> list:
    found = capture_on_cluster(asked, "local", workers)
    return [replace(inputs, states=inputs.states.clone(), beginnings=inputs.beginnings.clone()) for inputs in found]


@pytest.mark.parametrize(("workers", "lives"), [(1, [9]), (2, [9]), (3, [9, 9, 0, 9]), (3, [9, 2, 0, 9])])
def test_processes_find_what_one_finds_though_one_dies(folder, ray, workers, lives):
    asked, ray.lives = prompts_of(folder, entering=True), list(lives)
    found = shared(asked, workers)
    assert (len(ray.made), ray.killed, len(found)) == (workers, ray.made, 3)
    assert sum(2 - actor.restarts for actor in ray.made) == sum(life < 9 for life in lives)
    for one, other in zip(capture_router_inputs(asked), found, strict=True):
        assert (one.layer, one.prompts) == (other.layer, other.prompts)
        assert torch.equal(one.prompt, other.prompt)
        for name in ("states", "beginnings", "entering"):
            assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_in_a_process_is_said_as_in_one(folder, ray):
    tensors = load_weights(folder)
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 2] = torch.nan
    save_weights(folder, tensors)
    with pytest.raises(RouterError) as alone:
        list(capture_router_inputs(prompts_of(folder)))
    with pytest.raises(RouterError) as error:
        shared(prompts_of(folder), 2)
    assert str(error.value) == str(alone.value)
    assert ray.killed == ray.made


@dataclass(frozen=True)
class Deadly:
    """A file that kills the first process that reads it."""

    path: Path
    marker: Path

    def open(self, start: int, nbytes: int) -> Reader:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return open_range(self.path, start, nbytes)


def deadly(asked: PassRequest, marker: Path) -> PassRequest:
    """The request, whose base has a deadly file in layer 3."""
    tensors = {
        name: replace(tensor, path=Deadly(tensor.path, marker)) if ".layers.3." in name else tensor
        for name, tensor in asked.base.tensors.items()
    }
    return replace(asked, base=replace(asked.base, tensors=tensors))


# Compares what two processes find, one of which is killed, with what one finds.
_PROGRAM = """
import json, sys
from pathlib import Path
from moemerge.routers.cluster_pass import capture_on_cluster
from moemerge.routers.streamed_pass import capture_router_inputs
from tests.routers.test_cluster_pass import deadly, prompts_of

folder, marker = map(Path, sys.argv[1:])
asked = prompts_of(folder)
shared = capture_on_cluster(deadly(asked, marker), "local", 2)
pairs = zip(capture_router_inputs(asked), shared, strict=True)
print(json.dumps([[one.layer, float((one.states - other.states).abs().max())] for one, other in pairs]))
"""


@pytest.mark.slow
def test_processes_of_ray_find_what_one_finds_though_one_is_killed(folder, tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "-c", _PROGRAM, str(folder), str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    found = json.loads(done.stdout.splitlines()[-1])
    assert [layer for layer, _ in found] == [1, 2, 4]
    assert max(apart for _, apart in found) < 1e-5
