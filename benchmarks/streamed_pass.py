"""moemerge's own pass over the prompts of a config, as in a merge, with no weights written.

    python benchmarks/streamed_pass.py CONFIG

Prints the seconds from the plan to the finished routers, and their number of layers, as JSON.
"""

import argparse
import json
import time
from pathlib import Path

from moemerge import load_config, plan_merge
from moemerge.cli.console import return_freed_memory
from moemerge.routers.initialisation import init_routers
from moemerge.routers.request import PassOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    return_freed_memory()  # as the command does
    start = time.perf_counter()
    plan = plan_merge(load_config(options.config))
    routers = init_routers(plan.router_request, PassOptions(options.device, options.dtype), seed=0)
    print(json.dumps({"seconds": time.perf_counter() - start, "layers": len(routers.rows)}))


if __name__ == "__main__":
    main()
