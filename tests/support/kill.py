"""Kills merges at random moments and resumes them: `python -m tests.support.kill CONFIG FOLDER KILLS`; prints counts as JSON.

Each merge is a fork of this program, so that a kill costs milliseconds and not the import of torch.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from moemerge import MergePlan, load_config, merge, plan_merge
from moemerge.checkpoint import writer
from moemerge.checkpoint.staging import kept_shards
from moemerge.merging.options import MergeOptions
from moemerge.planning.options import PlanOptions

SHARD_BYTES = 12_000


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(plan: MergePlan, out: Path, *, resume: bool, overwrite: bool = False) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        merge(plan, out, MergeOptions(resume=resume, overwrite=overwrite))
        status = 0
    finally:
        os._exit(status)


def kill_and_resume(plan: MergePlan, out: Path, duration: float, counts: dict[str, int], rng: random.Random) -> None:
    resume = False
    while True:
        process = start(plan, out, resume=resume)
        time.sleep(rng.uniform(0, duration))
        if os.waitpid(process, os.WNOHANG) != (0, 0):
            break
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if out.exists():
            counts["after"] += 1  # renamed already: nothing is left to resume
            return
        kept = kept_shards(out)
        counts["kept" if kept else "nothing"] += 1
        resume = True
        if rng.random() < 0.5:  # the other half is killed again
            break
    if not out.exists():
        status = os.waitpid(start(plan, out, resume=True), 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0


def main(config: str, folder: Path, kills: int) -> None:
    setattr(writer, "CHUNK_BYTES", 1024)  # noqa: B010  it is final for everybody else
    plan = plan_merge(load_config(config), PlanOptions(max_shard_bytes=SHARD_BYTES))
    import moemerge.routers.computed  # noqa: F401  torch, once for all forks

    durations = []
    for _ in range(3):
        begin = time.monotonic()
        os.waitpid(start(plan, folder / "whole" / "out", resume=False, overwrite=True), 0)
        durations.append(time.monotonic() - begin)
    duration = min(durations)
    whole = contents(folder / "whole" / "out")
    counts = {"nothing": 0, "kept": 0, "after": 0, "shards": len(plan.shards)}
    rng = random.Random(0)
    while counts["nothing"] + counts["kept"] < kills:
        out = folder / "killed" / "out"
        kill_and_resume(plan, out, duration, counts, rng)
        found = contents(out)
        assert found.keys() == whole.keys()
        assert [name for name in whole if found[name] != whole[name]] == []
        shutil.rmtree(out)
        # A kill after the last rename can leave the lock and the journal, which the next run removes.
        names = {path.name for path in out.parent.iterdir()}
        assert names <= {f".out.moemerge-partial.{end}" for end in ("lock", "journal")}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
