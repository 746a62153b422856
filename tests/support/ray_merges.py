"""Merges by processes of a Ray cluster of several nodes on this machine, some of which are killed; prints what came of it.

    python -m tests.support.ray_merges CONFIG FOLDER

It is a program of its own, since Ray opens sockets.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.staging import kept_shards
from moemerge.errors import RefusedError
from moemerge.merging import shared_folder
from moemerge.merging.options import MergeOptions
from moemerge.merging.shard_jobs import FolderWorker, ShardJob, SharedStage, Surroundings
from moemerge.merging.shared_folder import SharedFolder
from moemerge.planning.options import PlanOptions
from moemerge.planning.plan import MergePlan
from tests.support.kill import contents

SHARD_BYTES = 12_000
BYTES_PER_SECOND = 30_000
WORKERS = 4
HIDDEN = "hidden"
"""The folder that a node does not see: a merge into it goes on until that node has said so."""
PRIVATE = ["unshare", "--map-root-user", "--mount"]


class SlowWorker(FolderWorker):
    """Writes slowly enough to be killed meanwhile, and says in a file beside the folder what it begins."""

    def __init__(self, here: Surroundings, writer: Callable[..., Any], stage: SharedStage) -> None:
        rate = BYTES_PER_SECOND / (20 if stage.folder.parent.name == HIDDEN else 1)

        def slow(folder: Path, shards: Any, _report: Any) -> Any:
            return writer(folder, shards, lambda nbytes: time.sleep(nbytes / rate))

        super().__init__(here, slow, stage)

    def run(self, job: ShardJob) -> None:
        node = ray.get_runtime_context().get_node_id()
        with (self._stage.folder.parent / "log").open("a") as file:
            file.write(f"{os.getpid()} {node} {job.shard.name}\n")
        super().run(job)


def began(out: Path) -> list[list[str]]:
    """Process, node and shard of everything that was begun, in order."""
    log = out.parent / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def half_way(out: Path) -> None:
    """Wait until some shards are complete, and another has just been begun."""
    while kept_shards(out) < 3:
        time.sleep(0.01)
    count = len(began(out))
    while len(began(out)) == count:
        time.sleep(0.01)
    time.sleep(0.1)


@contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=action)
    thread.start()
    yield
    thread.join()


def kill_last(out: Path) -> None:
    half_way(out)
    os.kill(int(began(out)[-1][0]), signal.SIGKILL)


def merged(plan: MergePlan, folder: Path, name: str, **options: Any) -> Path:
    """Merge into `FOLDER/NAME/out` by four processes."""
    out = folder / name / "out"
    out.parent.mkdir(exist_ok=True)
    merge(plan, SharedFolder(out, address="auto", workers=WORKERS), MergeOptions(**options))
    return out


def killed_head(config: str, folder: Path, address: str) -> tuple[Path, int]:
    """Kill the process that deals out shards; returns the output's path, and how many shards are left."""
    out = folder / "head" / "out"
    out.parent.mkdir()
    head = subprocess.Popen([sys.executable, "-m", "tests.support.ray_merges", config, str(folder), address])
    half_way(out)
    head.kill()
    head.wait()
    return out, kept_shards(out)


def nodes_of_cluster() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def refused(plan: MergePlan, folder: Path, address: str) -> str | None:
    """What is said if a node sees another folder at the same path; None where no such node can be made."""
    hidden = folder / HIDDEN
    hidden.mkdir()
    if subprocess.run([*PRIVATE, "true"], check=False, capture_output=True).returncode:
        return None
    start = f"{sys.executable} -m ray.scripts.scripts start --address={address} --num-cpus=4 --block"
    known = nodes_of_cluster()
    node = subprocess.Popen(
        [*PRIVATE, "sh", "-c", f"mount -t tmpfs none {hidden} && exec {start}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while nodes_of_cluster() <= known:
            time.sleep(0.1)
        merged(plan, folder, HIDDEN)
    except RefusedError as error:
        return str(error)
    finally:
        node.terminate()
        node.wait()
    return ""


def main(config: str, folder: Path) -> None:
    plan = plan_merge(load_config(config), PlanOptions(max_shard_bytes=SHARD_BYTES))
    merge(plan, folder / "alone" / "out")
    alone = contents(folder / "alone" / "out")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=3) for _ in range(2)]
    cluster.connect()
    found: dict[str, Any] = {"shards": len(plan.shards_without_routers)}
    out = merged(plan, folder, "together")
    found["together"] = contents(out) == alone
    found["processes"], found["nodes"] = (len({line[place] for line in began(out)}) for place in (0, 1))
    out = folder / "worker" / "out"
    with meanwhile(partial(kill_last, out)):
        merged(plan, folder, "worker")
    found["worker killed"] = contents(out) == alone
    names = [name for _, _, name in began(out)]
    found["begun again"] = len(names) - len({*names})
    out, kept = killed_head(config, folder, cluster.address)
    before = len(began(out))
    merged(plan, folder, "head", resume=True)
    found["head killed"], found["kept"] = contents(out) == alone, kept
    found["done after that"] = len(began(out)) - before
    out = folder / "node" / "out"

    def remove() -> None:
        half_way(out)
        cluster.remove_node(nodes[0], allow_graceful=False)

    with meanwhile(remove):
        merged(plan, folder, "node")
    found["node removed"] = contents(out) == alone
    found["refused"] = refused(plan, folder, cluster.address)
    merges = ("together", "worker", "head", "node")
    found["left"] = [path.name for name in merges for path in sorted((folder / name).iterdir())]
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    setattr(shared_folder, "FolderWorker", SlowWorker)  # noqa: B010  what is imported is final for everybody else
    if len(sys.argv) == 4:
        given = plan_merge(load_config(sys.argv[1]), PlanOptions(max_shard_bytes=SHARD_BYTES))
        merge(given, SharedFolder(Path(sys.argv[2]) / "head" / "out", address=sys.argv[3], workers=WORKERS))
    else:
        main(sys.argv[1], Path(sys.argv[2]))
