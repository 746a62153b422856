"""The benchmark suite runs, over tiny models: every row is there, nothing is left behind, and the baseline is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moemerge import load_config, merge, plan_merge
from moemerge.plan import Computed
from tests.models import TEXT, make_model

ROOT = Path(__file__).parents[1]
ROWS = [
    "merge, 4 x tiny, random: time / raw copy + fsync",
    "merge, 4 x tiny, random: time / raw copy, not flushed",
    "merge, 4 x tiny, random: time / mergekit-moe",
    "merge, 4 x tiny, random: peak memory",
    "merge, 4 x tiny, cheap_embed: time / raw copy + fsync",
    "merge, 4 x tiny, cheap_embed: time / raw copy, not flushed",
    "merge, 4 x tiny, cheap_embed: time / mergekit-moe",
    "merge, 4 x tiny, cheap_embed: peak memory",
    "hidden, tiny, 40 prompts: time of the pass alone / whole model",
    "hidden, tiny, 40 prompts: peak memory of that pass",
    "hidden, tiny, 40 prompts: peak memory of the merge",
    "memory, 2 x tiny, random, 1GB shards: peak",
    "memory, 2 x tiny, random, 10GB shards: peak",
    "memory, 8 x tiny, random, 10GB shards: peak",
    "memory: largest of these peaks / smallest",
    "cast, fp32 -> bf16, 2 x tiny: input per second and core",
    "cast, fp32 -> bf16, 2 x tiny: peak memory",
    "cast, fp16 -> bf16, 2 x tiny: input per second and core",
    "cast, fp16 -> bf16, 2 x tiny: peak memory",
    "cast, F32 -> BF16, one thread alone",
    "cast, F16 -> BF16, one thread alone",
    "plan, 8 x tiny: time",
    "plan, 8 x tiny: bytes read, Python's modules included",
    "moemerge --help: time",
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copy_file_range, /proc")


def run(program: str, *arguments: str | Path) -> str:
    command = [sys.executable, ROOT / "benchmarks" / program, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_suite_prints_every_row_and_leaves_nothing(tmp_path):
    folder, other = tmp_path / "bench", tmp_path / "mergekit-moe"
    folder.mkdir()
    (folder / "kept").touch()
    other.write_text('#!/bin/sh\nmkdir "$2"\n')
    other.chmod(0o755)
    printed = run("bench.py", "--folder", folder, "--shape", "tiny", "--repeat", "1", "--mergekit", other, "--markdown")
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [cells[0] for cells in table[2:]] == ROWS
    assert {len(cells) for cells in table} == {4}
    assert "not measured" not in printed
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_the_raw_copy_moves_the_bytes_of_the_merge_except_the_routers(llamas, tmp_path):
    config = tmp_path / "merge.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "base_model": str(llamas[0]),
                "gate_mode": "random",
                "experts": [{"source_model": str(model)} for model in llamas[1:]],
            }
        )
    )
    plan = plan_merge(load_config(config), max_shard_bytes=100_000)
    merge(plan, tmp_path / "merged")
    run("ranges.py", config, tmp_path / "ranges.json", "--max-shard-size", "100000")
    run("raw_copy.py", tmp_path / "ranges.json", tmp_path / "raw", "--fsync")

    assert len(plan.shards) > 1
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {shard.name for shard in plan.shards}
    routers = {name for name, output in plan.outputs.items() if isinstance(output.origin, Computed)}
    assert routers
    for shard in plan.shards:
        merged, raw = (bytearray((tmp_path / out / shard.name).read_bytes()) for out in ("merged", "raw"))
        assert len(raw) == shard.nbytes
        ends = [*list(shard.starts.values())[1:], shard.nbytes]
        for (name, start), end in zip(shard.starts.items(), ends, strict=True):
            if name in routers:
                assert merged[start:end] != raw[start:end]
                merged[start:end] = raw[start:end]
        assert merged == raw
    moved = sum(entry[4] for entry in json.loads((tmp_path / "ranges.json").read_text())["ranges"])
    assert moved == plan.weight_bytes - sum(
        end - start
        for shard in plan.shards
        for (name, start), end in zip(
            shard.starts.items(), [*list(shard.starts.values())[1:], shard.nbytes], strict=True
        )
        if name in routers
    )


def make_models_and_texts(folder: Path) -> None:
    for seed, name in enumerate(("base", "fox", "code")):
        make_model(folder / "models" / name, seed)
    (folder / "texts").mkdir()
    lines = TEXT.split("\n")
    for name, line in (("fox", lines[0]), ("code", lines[1])):
        for kind, text in (("calib", line), ("test", line[::-1])):
            (folder / "texts" / f"{name}.{kind}.txt").write_text("\n<|document|>\n".join([text, text[7:], text[::2]]))


def test_tunings_are_judged_on_any_models_and_texts(tmp_path):
    make_models_and_texts(tmp_path)
    printed = run(
        "tuning.py", tmp_path / "models", tmp_path / "texts", "--tokens", "60", "--steps", "2", "--markdown"
    )  # fmt: skip
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in printed.splitlines() if line.startswith("| ")}
    assert list(rows) == [
        "routers", "---", "uniform mixture", "label oracle", "random", "ridge", "random, gates",
        "random, gates, distilled", "ridge, gates, distilled", "ridge, gates", "random, phatgoose",
    ]  # fmt: skip
    assert ", step " in rows["ridge, gates"]


def test_routers_are_judged_on_any_models_and_texts(tmp_path):
    make_models_and_texts(tmp_path)
    (tmp_path / "prompts.yaml").write_text("fox: [The fox, The dog]\ncode: [def main, return]\n")
    ways = ["random", "mergekit_hidden, prompts", "ridge, prompts", "ridge, texts"]
    printed = run(
        "routers.py", tmp_path / "models", tmp_path / "texts", "--prompts", tmp_path / "prompts.yaml", "--tokens", "60",
        "--repeat", "1", "--markdown", *(part for way in ways for part in ("--way", way)),
    )  # fmt: skip
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in printed.splitlines() if line.startswith("| ")}
    expected = ["router", "---", "base, dense", "code, dense", "fox, dense", "uniform mixture", "label oracle"]
    expected += ["weight average", "random", "mergekit_hidden, prompts", "ridge, prompts", "ridge, texts"]
    assert list(rows)[:12] == expected
    assert "| 1.00 |" in rows["label oracle"] or "| - |" in rows["label oracle"]
    assert any(row.startswith("bfloat16 flips the first choice: ridge, texts") for row in rows)
    assert any(row.startswith("ridge, texts: time / plain forward pass") for row in rows)
