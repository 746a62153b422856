"""The files of docs/scale run what moemerge has, with what Kubernetes, Slurm and Ray's cluster launcher take."""

import copy
import re
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from moemerge.cli.app import command_line
from moemerge.cli.usage_errors import UsageError
from tests.support.machine import ROOT

FOLDER = ROOT / "docs" / "scale"
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
PAGE = ROOT / "docs" / "scale.md"
# Of KubeRay's ray-operator/apis/ray/v1, rayjob_types.go and raycluster_types.go: what of their keys is used here.
JOB_KEYS = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
CLUSTER_KEYS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_KEYS = {"rayStartParams", "template"}
WORKERS_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas"}


def shared_claim() -> dict[str, Any]:
    return next(yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text()))


def ray_job() -> dict[str, Any]:
    _, job = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    return job


def groups() -> list[dict[str, Any]]:
    """The head's pods and the workers'."""
    cluster = ray_job()["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def launcher() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "aws.yaml").read_text())


def commands() -> list[str]:
    """Each command line of moemerge that the files and the page show."""
    shown = "\n".join(path.read_text() for path in (*FILES, PAGE))
    return [
        ray_job()["spec"]["entrypoint"],
        *re.findall(r"^(?:# )?    (?:.*(?:slurm\.sh|&&) )?(moemerge [^'#\n]+)", shown, re.MULTILINE),
    ]


def parsed(words: list[str]) -> str:
    """The command that takes a command line; raises where there is none, or an option is not its own."""
    group: Any = typer.main.get_command(command_line())
    name = words[0] if words[0] in group.commands else "merge"
    group.commands[name].make_context(name, words[words[0] == name :])
    return name


def test_every_command_is_one_of_ours_with_options_that_it_has():
    assert {parsed(shlex.split(line)[1:]) for line in commands()} >= {"search"}
    assert len(commands()) >= len(FILES) - 1  # of all but the image
    with pytest.raises(UsageError, match="--rays"):
        parsed(["search", "recipe.yaml", "--rays", "auto"])


def test_versions_of_ray_are_one_and_fit_the_extra():
    found = {
        path.name: re.findall(r"(?:ray\S*==|moemerge-ray:|rayVersion: )([\d.]+\d)", path.read_text()) for path in FILES
    }
    assert [name for name, versions in found.items() if not versions] == [
        "slurm.sh"
    ]  # it takes that of the environment
    (version,) = {version for versions in found.values() for version in versions}
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"][0]
    assert Version(version) in SpecifierSet(extra.removeprefix("ray"))


def test_all_pods_have_one_image_and_see_the_claim_at_the_paths_of_the_command():
    claim, job = shared_claim(), ray_job()["spec"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert (mount["name"], volume["persistentVolumeClaim"]["claimName"]) == (
            volume["name"],
            claim["metadata"]["name"],
        )
        paths = re.findall(r"(?<=[ =])/\S+", job["entrypoint"])
        assert len(paths) >= 3
        assert [path for path in paths if not path.startswith(f"{mount['mountPath']}/")] == []
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups()}) == 1


def test_the_job_has_keys_of_kuberay_only():
    job = ray_job()
    assert (job["apiVersion"], job["kind"], set(job)) == (
        "ray.io/v1",
        "RayJob",
        {"apiVersion", "kind", "metadata", "spec"},
    )
    assert set(job["spec"]) == JOB_KEYS
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == CLUSTER_KEYS
    assert set(cluster["headGroupSpec"]) == GROUP_KEYS
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == GROUP_KEYS | WORKERS_KEYS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups():  # as of a command line: text
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_claim_and_pods_are_right_by_the_schemas_of_kubernetes():
    validate = pytest.importorskip("kubernetes_validate").validate
    validate(shared_claim(), "1.31", strict=True)
    for group in groups():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        validate(pod, "1.31", strict=True)
        wrong = copy.deepcopy(pod)
        wrong["spec"]["containers"][0]["volumeMounts"][0]["mountpath"] = "/"
        with pytest.raises(Exception, match="mountpath"):
            validate(wrong, "1.31", strict=True)


def test_the_launcher_is_right_by_the_schema_of_ray():
    util = pytest.importorskip("ray.autoscaler._private.util")
    util.validate_config(util.prepare_config(launcher()))
    with pytest.raises(Exception, match="colour"):
        util.validate_config(util.prepare_config({**launcher(), "colour": "red"}))


def test_the_launcher_gives_the_head_no_work_and_begins_all_workers_at_once():
    config = launcher()
    head, worker = (config["available_node_types"][name] for name in ("head", "worker"))
    assert head["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert worker["min_workers"] == worker["max_workers"] == config["max_workers"]


def test_the_script_of_slurm_is_one():
    script = FOLDER / "slurm.sh"
    checks = [["bash", "-n", script], *([["shellcheck", script]] if shutil.which("shellcheck") else [])]
    for check in checks:
        done = subprocess.run(check, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
