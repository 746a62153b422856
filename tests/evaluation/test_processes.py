"""Text that processes of a cluster share: what they find together is what one process finds."""

import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moemerge import EvaluationSettings, evaluate, load_config, merge, plan_merge
from moemerge.config.schema import CONFIG_COPY
from moemerge.errors import CheckpointError, RefusedError
from moemerge.evaluation import measuring
from moemerge.passes.sharing_out import hands_of
from tests.support.models import write_config
from tests.support.recipes import documents
from tests.support.stand_in_ray import Ray

SETTINGS = EvaluationSettings(tokens=1500, window=60, device="cpu", compute_dtype="float32")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory, llamas) -> Path:
    root = tmp_path_factory.mktemp("processes")
    merge(plan_merge(load_config(write_config(root / "c.yaml", llamas[0], llamas[1:], prompts=False))), root / "out")
    (root / "out" / CONFIG_COPY).unlink()  # so that the mixture is run alone
    for seed, name in enumerate(("fox", "code")):
        (root / f"{name}.txt").write_text(documents(seed, 15))
    return root


@pytest.fixture
def ray(monkeypatch) -> Ray:
    monkeypatch.setitem(sys.modules, "ray", None)  # for the time of the test
    return Ray().install()


def data(world: Path) -> dict[str, list[str]]:
    return {name: [str(world / f"{name}.txt")] for name in ("fox", "code")}


def test_texts_are_dealt_out_evenly_and_in_their_order():
    assert hands_of([5, 1, 9, 7, 3], 2) == [[1, 2, 4], [0, 3]]
    assert hands_of([4, 4], 5) == [[0], [1]]


def same(found: object, expected: object) -> bool:
    """Whether facts are equal but for the noise of other batches."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("command", ["eval", "routes", "analyze", "prune"])
def test_commands_find_by_processes_what_they_find_alone(run, world, tmp_path, ray, command):
    words = [command, world / "out", *([tmp_path / "pruned", "--keep=2", "--dry-run"] if command == "prune" else [])]
    if command == "routes":
        words += [f"--file={path}" for (path,) in data(world).values()]
    else:
        words += [f"--data={name}={path}" for name, (path,) in data(world).items()] + ["--window=60"]
    words += ["--device=cpu", "--compute-dtype=float32", "--max-tokens=1500", "--json", "-q"]
    code, alone, _ = run(*words)
    assert (code, ray.made) == (0, [])
    code, shared, _ = run(*words, "--ray=local", "--workers=3")
    assert (code, len(ray.made), ray.killed) == (0, {"prune": 6}.get(command, 3), ray.made)
    assert same(json.loads(shared), json.loads(alone))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_texts_are_coloured_by_processes_as_by_one(run, world, ray, workers):
    words = ["routes", world / "out", f"--file={world / 'fox.txt'}", "--text=A short one", "--compute-dtype=float32"]
    alone = run(*words, "-q")
    assert run(*words, "-q", "--ray=local", f"--workers={workers}") == alone
    assert (alone[0], len(ray.made), ray.killed) == (0, workers, ray.made)


def test_no_more_processes_are_begun_than_there_are_texts(run, world, ray):
    words = ["routes", world / "out", "--text=A fox", "--text=A bird", "--ray=local", "-q"]
    for workers in ([], ["--workers=9"]):
        ray.made.clear()
        assert (run(*words, *workers)[0], len(ray.made)) == (0, 2)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_find_what_one_finds(world, ray, workers):
    alone = evaluate(world / "out", data(world), SETTINGS)
    settings, told = replace(SETTINGS, ray="local", workers=workers), []
    shared = evaluate(
        world / "out", data(world), settings, progress=lambda task, *done: told.append((task.unit, *done))
    )
    assert told == [("parts", done, workers) for done in range(workers + 1)]
    assert (len(ray.made), ray.killed, ray.asked) == (workers, ray.made, workers)
    for model, of in alone.losses.items():
        for name, loss in of.items():
            assert shared.losses[model][name].value == pytest.approx(loss.value, rel=1e-6)
    for name, routing in alone.routing.items():
        assert shared.routing[name].load_by_layer == routing.load_by_layer
        assert shared.routing[name].entropy == pytest.approx(routing.entropy, rel=1e-5)
        assert shared.routing[name].top_weight == pytest.approx(routing.top_weight, rel=1e-5)


def test_an_error_in_a_process_is_raised_as_in_one(world, ray, monkeypatch):
    given = measuring.open_mixture

    def damaged(folder, **keys):
        mixture = given(folder, **keys)
        read = mixture.runnable.read
        nothing = replace(mixture.tensors["model.norm.weight"], path=Path("/nowhere/model.safetensors"))

        def reading(name: str):
            return nothing.open() if name == "model.norm.weight" else read(name)

        return replace(mixture, runnable=replace(mixture.runnable, read=reading))

    monkeypatch.setattr(measuring, "open_mixture", damaged)
    with pytest.raises(CheckpointError):
        evaluate(world / "out", data(world), SETTINGS)
    with pytest.raises(RefusedError) as refused:
        evaluate(world / "out", data(world), replace(SETTINGS, ray="local", workers=2))
    assert str(refused.value) == (
        f"--ray: {platform.node()} has no /nowhere/model.safetensors. Every process reads the models itself: they have "
        "to be at the same paths on all machines, as on a file system that these share."
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers=2"], "--workers: needs --ray. Add `--ray local` for processes on this machine."),
        (
            ["--ray=local", "--devices=cpu,cpu"],
            "--devices cpu,cpu: each process of --ray has one device. Name one, or leave out --ray.",
        ),
        (["--ray=local", "--device=cuda:1"], "--device cuda:1: each process of --ray sees one GPU. Write cuda."),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(run, world, tmp_path, options, said):
    text = f"--data=fox={world / 'fox.txt'}"
    for words in (
        ("eval", world / "out", text),
        ("routes", world / "out", "--text=The fox"),
        ("analyze", world / "out", text),
        ("prune", world / "out", tmp_path / "out", text, "--keep=2"),
    ):
        assert run(*words, *options, "-q") == (2, "", f"error: {said}\n")


def test_text_of_routers_is_shared_only_by_processes(run, world, tmp_path):
    assert run(world / "c.yaml", tmp_path / "out", "--share-text", "-q") == (
        2,
        "",
        "error: --share-text: needs --ray. Add `--ray local` for processes on this machine.\n",
    )


# A merge in the paths of the command line is evaluated alone, by three processes, and by two of which one is killed;
# so are the choices of its routers traced.
_PROGRAM = """
import json, os, signal, sys
from dataclasses import asdict, replace
from pathlib import Path
from moemerge.evaluation import measuring
from moemerge.evaluation.evaluator import evaluate
from moemerge.evaluation.routes import tracing
from moemerge.evaluation.settings import TraceSettings
from tests.evaluation.test_processes import SETTINGS, data, killing

world = Path(sys.argv[1])
given = measuring.open_mixture
found = [evaluate(world / "out", data(world), SETTINGS)]
found.append(evaluate(world / "out", data(world), replace(SETTINGS, ray="local", workers=3)))
measuring.open_mixture = lambda folder, **keys: killing(given(folder, **keys), world / "killed")
found.append(evaluate(world / "out", data(world), replace(SETTINGS, ray="local", workers=2)))
texts = {name: Path(path).read_text() for name, (path,) in data(world).items()}
given, traced = tracing.open_mixture, [tracing.trace(world / "out", texts, TraceSettings(200))]
tracing.open_mixture = lambda folder: killing(given(folder), world / "killed for routes")
traced += [tracing.trace(world / "out", texts, TraceSettings(200, ray="local", workers=2))]
traced = [[[text.experts.tolist(), text.weights.tolist()] for text in routes.texts] for routes in traced]
print(json.dumps([[asdict(one) for one in found], traced]))
"""


def killing(mixture, marker: Path):
    """The mixture, whose second layer kills the first process that reads it."""
    read = mixture.runnable.read

    def reading(name: str):
        if ".layers.1." in name and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(name)

    return replace(mixture, runnable=replace(mixture.runnable, read=reading))


@pytest.mark.slow
def test_processes_of_ray_find_what_one_finds_though_one_is_killed(world):
    pytest.importorskip("ray")
    command = [sys.executable, "-c", _PROGRAM, str(world)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (alone, three, killed), routes = json.loads(done.stdout.splitlines()[-1])
    assert (world / "killed").exists()
    assert (world / "killed for routes").exists()
    assert same(routes[1], routes[0])
    for shared in (three, killed):
        for model, of in alone["losses"].items():
            for name, loss in of.items():
                assert shared["losses"][model][name]["value"] == pytest.approx(loss["value"], rel=1e-6)
        assert shared["routing"].keys() == alone["routing"].keys()
        for name, routing in alone["routing"].items():
            assert shared["routing"][name]["load_by_layer"] == routing["load_by_layer"]
