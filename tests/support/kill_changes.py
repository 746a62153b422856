"""Kills changes in place at random moments: `python -m tests.support.kill_changes FOLDER KILLS`; prints counts as JSON.

Each change is a fork of this program. After a kill and `recover` the model is the old one or the new one.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moemerge.checkpoint.in_place import changing, commit, recover, replace_model, undo

OLD = {
    "config.json": b"old", "model.safetensors.index.json": b"old", "README.md": b"both", "model-00001-of-00002.safetensors": b"old",
    "model-00002-of-00002.safetensors": b"both", "templates/one.jinja": b"old",
}  # fmt: skip
CHANGED = {
    "config.json": b"new", "model.safetensors.index.json": b"new", "model-edit1-00001.safetensors": b"new" * 50_000,
    "templates/two.jinja": b"new",
}  # fmt: skip
REMOVED = ["model-00001-of-00002.safetensors", "templates/one.jinja"]
NEW = {name: text for name, text in OLD.items() if name not in REMOVED} | CHANGED


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(model: Path) -> None:
    with changing(model) as new:
        fill(new, CHANGED)
        replace_model(model, REMOVED)


STEPS: dict[str, tuple[Callable[[Path], None], list[dict[str, bytes]]]] = {
    "change": (change, [OLD, NEW]),
    "undo": (undo, [NEW, OLD]),
    "commit": (commit, [NEW]),
}


def start(doing: Callable[[Path], None], model: Path) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        doing(model)
        status = 0
    finally:
        os._exit(status)


def prepare(folder: Path, name: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    fill(folder / "model", OLD)
    if name != "change":
        change(folder / "model")
    return folder / "model"


def main(folder: Path, kills: int) -> None:
    durations = {}
    for name, (doing, _) in STEPS.items():
        model = prepare(folder, name)
        begin = time.monotonic()
        os.waitpid(start(doing, model), 0)
        durations[name] = time.monotonic() - begin
    rng = random.Random(0)
    counts = {"killed": 0, "recovered": 0, "old": 0, "new": 0}
    while counts["killed"] < kills:
        name = rng.choice(list(STEPS))
        doing, allowed = STEPS[name]
        model = prepare(folder, name)
        process = start(doing, model)
        time.sleep(rng.uniform(0, durations[name]))
        if os.waitpid(process, os.WNOHANG) != (0, 0):
            continue
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        counts["killed"] += 1
        seen = contents(model)
        assert "config.json" not in seen or seen in allowed, (name, seen.keys())
        counts["recovered"] += recover(model)
        found = contents(model)
        assert found in allowed, (name, found.keys())
        counts["old" if found == OLD else "new"] += 1
        others = {path.name for path in folder.iterdir()} - {"model"}
        assert all(name == ".model.moemerge-undo" or name.endswith(".lock") for name in others), others
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
