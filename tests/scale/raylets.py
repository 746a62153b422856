"""A command beside a Ray cluster of several nodes on this machine, which it finds by `--ray auto`.

    python -m tests.scale.raylets 1,1,2 COMMAND ...

begins a node of one CPU, which is the head, another one, and one of two CPUs. It is a program of its own, since Ray
opens sockets.
"""

import os
import subprocess
import sys

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 100_000_000


def run(cpus: list[int], command: list[str]) -> int:
    """Run a command beside a cluster; returns its exit code."""
    cluster = Cluster()
    try:
        for count in cpus:
            cluster.add_node(num_cpus=count, object_store_memory=OBJECT_STORE_BYTES)
        cluster.wait_for_nodes()
        return subprocess.run(command, check=False, env=os.environ | {"RAY_ADDRESS": cluster.address}).returncode
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(run([int(count) for count in sys.argv[1].split(",")], sys.argv[2:]))
